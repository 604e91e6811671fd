"""Writes a trained run as a GGUF file, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from lavintk.errors import ModelError
from lavintk.merge import LANGUAGE, PlainModel, load_on_cpu, pick_condition, tensors, with_biases
from lavintk.models.catalog import locate
from lavintk_gguf.architecture import Architecture
from lavintk_gguf.card import write_card
from lavintk_gguf.tokenizer import add_tokenizer

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run
    from lavintk_gguf import GgufOptions

CHUNK_ELEMENTS = 1 << 22
"""Values that are quantized at a time; bounds the temporary memory."""
BLOCK = 32
"""Values that share a scale in every quantized type offered; rows of another length are stored as f16."""
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices with a row for each token: llama.cpp keeps them finer than the 4-bit types, and so do we."""


class GgufExporter:
    """The text model with the adapter folded in."""

    def __init__(self, options: GgufOptions) -> None:
        self.options = options

    def export(self, run: Run, out: Path) -> None:
        """Write ``<name of the run>-<TYPE>.gguf`` and ``README.md`` into the new folder ``out``.

        :raises NotAffineError: the adapter has no affine form.
        :raises ModelError: llama.cpp has no such model, no such biases or no such tokenizer; says what to do.
        """
        from gguf import GGUFWriter

        assembly = load_on_cpu(run)
        if assembly.model.vision is not None:
            click.echo("left out: images. The file holds the text model alone, without vision tower; onnx has both")
        condition = pick_condition(assembly.model, self.options.condition)
        architecture = Architecture.of(assembly.model.language.config)
        plain = PlainModel(assembly.model, condition)
        _, shapes = with_biases(architecture.config, plain.biased())
        architecture.check_biases(shapes)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{run.recipe.name}-{self.options.type.upper()}.gguf"
        writer = GGUFWriter(path, architecture.name)
        self._add_general(writer, run)
        architecture.add_settings(writer)
        add_tokenizer(writer, assembly, locate(run.recipe.model.language))
        self._write_tensors(writer, architecture, plain, shapes)
        writer.close()
        write_card(out, path, run, assembly, condition, architecture)

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        """Return the bytes of the tensors; see :class:`lavintk.contracts.SizedExporter`."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in outline.linears().items()
        }
        shapes |= outline.frozen_shapes()
        own = {name.removeprefix(LANGUAGE): shape for name, shape in shapes.items() if name.startswith(LANGUAGE)}
        if outline.language.config.tie_word_embeddings:
            own.pop("lm_head.weight", None)
        return sum(_nbytes(shape, self._type_of(name, shape)) for name, shape in own.items())

    def _add_general(self, writer: Any, run: Run) -> None:
        from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

        kind = self.options.type.upper()
        writer.add_type(GGUFType.MODEL)
        writer.add_name(run.recipe.name)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType[{"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")])

    def _write_tensors(
        self, writer: Any, architecture: Architecture, plain: PlainModel, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        names = architecture.tensor_names(shapes)
        extra = architecture.rope_frequencies()
        for name, tensor in extra.items():
            self._announce(writer, name, tuple(tensor.shape), "F32")
        for name, shape in shapes.items():
            self._announce(writer, names[name], shape, self._type_of(name, shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in extra.values():
            writer.write_tensor_data(tensor.numpy())
        for name, tensor in tensors(plain, shapes):
            values = architecture.in_order(name, tensor).float().contiguous().numpy()
            writer.write_tensor_data(_stored(name, values, self._type_of(name, shapes[name])))

    def _type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """Return the name of the GGML type in which a tensor is stored."""
        kind = self.options.type.upper()
        if len(shape) < 2:
            return "F32"
        if kind.startswith("Q") and shape[-1] % BLOCK:
            return "F16"
        return "Q8_0" if kind.startswith("Q4") and name in ROWS else kind

    @staticmethod
    def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
        from gguf import GGMLQuantizationType

        code = GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, kind), raw_dtype=code)


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor in a GGML type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // values * nbytes


def _stored(name: str, values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Return fp32 ``values`` ``[rows, columns]`` or ``[n]`` as the bytes of a GGML type.

    :raises ModelError: a value does not fit.
    """
    if kind == "F32":
        return values
    return np.concatenate([_quantized(name, rows, kind) for rows in _chunks(values)])


def _quantized(name: str, rows: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind in ("F16", "Q8_0", "Q4_0", "Q4_1"):  # values or scales are fp16
        largest = float(np.abs(rows).max(initial=0))
        limit = float(np.finfo(np.float16).max) * {"Q8_0": 127, "Q4_0": 8, "Q4_1": 1}.get(kind, 1)
        if not largest <= limit:
            raise ModelError(f"{name} does not fit into {kind} (its largest value is {largest:.3g}): use type=bf16")
    packed: NDArray[Any] = quantize(rows, GGMLQuantizationType[kind])
    return packed.view(np.uint8).reshape(len(rows), -1)


def _chunks(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    step = max(1, CHUNK_ELEMENTS // values.shape[-1])
    for first in range(0, len(values), step):
        yield values[first : first + step]
