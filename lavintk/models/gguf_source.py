"""Weights and configuration out of a GGUF file, as llama.cpp writes it for Llama-like models.

The header is parsed here, by the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
the reader of the ``gguf`` package makes an object of every token and takes seconds. Its name maps and its
dequantization are used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.errors import CheckpointError, ModelError
from lavintk.models.sources import StoredTensor, fingerprint

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
"""Supported values of ``general.architecture``; Mistral's models are written as ``llama``."""
PERMUTED = frozenset({"llama", "smollm3"})
"""Architectures whose query and key rows llama.cpp reorders, so that it can rotate adjacent pairs."""
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how Llama 3's rope scaling is stored."""
CHUNK_ELEMENTS = 1 << 22
"""Values that are dequantized at a time; bounds the temporary memory."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file.

    :param metadata: by key; an array of strings is given as its length.
    :param tensors: by GGUF name; shapes in the order of torch, ``begin`` from the start of the file.
    :param length: bytes before the first tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    length: int


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    :raises ModelError: the file is no GGUF file, or of a version or byte order that is not supported.
    :raises CheckpointError: the file is truncated or corrupt, all faults listed.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer, not the model; fetch it with git lfs pull")
        if start[:4] != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it starts with {start[:4]!r}, not b'GGUF'")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Parser(path, data).parse()
        except (struct.error, UnicodeDecodeError, OverflowError, KeyError) as error:
            reason = f"the header is truncated or corrupt: {type(error).__name__}: {error}"
            raise CheckpointError(str(path), [reason], "Download the file again.") from error
    needed = max((t.begin + t.nbytes for t in header.tensors.values()), default=header.length)
    if needed > size:
        lost = [f"{t.name} ends beyond the file" for t in header.tensors.values() if t.begin + t.nbytes > size]
        raise CheckpointError(f"{path} ({size} of {needed} bytes)", lost, "It is truncated: download it again.")
    return header


class _Parser:
    """Walks through a header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 4

    def parse(self) -> GGUFHeader:
        (version,) = self.take("I")
        if version not in (2, 3):
            big_endian = version & 0xFFFF == 0
            found = "big-endian" if big_endian else f"of version {version}"
            raise ModelError(f"{self.path} is a GGUF file {found}; lavintk reads little-endian versions 2 and 3")
        tensor_count, metadata_count = self.take("QQ")
        metadata = {}
        for _ in range(metadata_count):
            key = self.string()
            metadata[key] = self.value(self.take("I")[0])
        table = [self.tensor() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32)) or 32
        data_begin = -(-self.position // alignment) * alignment
        tensors = {
            name: StoredTensor(name, dtype, shape, self.path, data_begin + offset, nbytes)
            for name, dtype, shape, offset, nbytes in table
        }
        return GGUFHeader(metadata, tensors, data_begin)

    def take(self, form: str) -> tuple[Any, ...]:
        """Return the numbers of a ``struct`` format, little-endian, without padding."""
        values = struct.unpack_from(f"<{form}", self.data, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        return bytes(self.take(f"{self.within(length)}s")[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, count = self.take("IQ")
        if item != _STRING:
            return list(self.take(f"{self.within(count)}{_SCALARS[item]}"))
        for _ in range(count):
            (length,) = self.take("Q")
            self.position += length
        return count

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        (dimensions,) = self.take("I")
        shape = tuple(reversed(self.take(f"{self.within(dimensions)}Q")))
        code, offset = self.take("IQ")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise ModelError(f"{self.path}: {name} is of GGML type {code}, unknown to this gguf package") from error
        values, stored = GGML_QUANT_SIZES[kind]
        return name, kind.name, shape, offset, prod(shape) // values * stored

    def within(self, count: int) -> int:
        """Return ``count``; a corrupt one is told from its size before memory is asked for."""
        if count > len(self.data):
            raise OverflowError(f"{count} items at byte {self.position}")
        return count


class GGUFSource:
    """A GGUF file under Hugging Face's parameter names and row order."""

    def __init__(self, path: Path, description: str | None = None) -> None:
        """Read the header and give each tensor its name.

        :raises ModelError: no GGUF file, or a model that is not supported; says what it is.
        :raises CheckpointError: truncated or corrupt, tensors of another architecture, or no embedding.
        """
        self.path, self.description = path, description or str(path)
        self._header = read_header(path)
        self._architecture = _supported_architecture(self._header.metadata, self.description)
        self._check_number_types()
        stored = {n: t for n, t in self._header.tensors.items() if n != ROPE_FREQUENCIES}
        known = _hugging_face_names(self._architecture, int(self._value("block_count")))
        unknown = [
            f"{name} is not a tensor of architecture {self._architecture}" for name in stored if name not in known
        ]
        self._tensors = {known[name]: tensor for name, tensor in stored.items() if name in known}
        if "model.embed_tokens.weight" not in self._tensors:
            unknown.append("token_embd.weight is missing")
        if unknown:
            raise CheckpointError(self.description, unknown)
        self._heads = {"q_proj": self._value("attention.head_count"), "k_proj": self._key_value_heads()}

    def config(self) -> PretrainedConfig:
        """Return a transformers configuration made from the metadata.

        :raises ModelError: the metadata lack something, or ask for what the architecture does not have.
        """
        from transformers import AutoConfig

        hidden, heads = int(self._value("embedding_length")), int(self._value("attention.head_count"))
        head_dim = int(self._value("attention.key_length", hidden // heads))
        tokenizer = {role: self._header.metadata.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL_IDS.items()}
        settings: dict[str, Any] = {
            "architectures": [_MODEL_CLASSES[self._architecture]],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": int(self._value("feed_forward_length")),
            "num_hidden_layers": int(self._value("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._key_value_heads()),
            "head_dim": head_dim,
            "max_position_embeddings": int(self._value("context_length")),
            "rms_norm_eps": _shortest(self._value("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope_parameters(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **tokenizer,
            **self._biases(),
        }
        if self._architecture == "smollm3":
            settings["no_rope_layer_interval"] = 4  # fixed in llama.cpp's graph, no key in the file says it
        return AutoConfig.for_model(self._architecture, **settings)

    def names(self) -> list[str]:
        """Return Hugging Face's parameter names in the order of the file, without a tied ``lm_head``."""
        return sorted(self._tensors, key=lambda name: self._tensors[name].begin)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, ``[out, in]`` for linear layers."""
        return self._tensors[name].shape

    def nbytes(self) -> int:
        """Return the quantized bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the quantized bytes of one tensor."""
        return self._tensors[name].nbytes

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor dequantized to fp32, query and key rows in Hugging Face's order.

        :raises CheckpointError: the file cannot be read any more.
        """
        tensor = self._tensors[name]
        try:
            value = _dequantized(tensor)
        except OSError as error:
            raise CheckpointError(self.description, [f"{tensor.name}: {error}"]) from error
        projection = name.split(".")[-2]
        if self._architecture in PERMUTED and projection in self._heads:
            return _unpermuted(value, int(self._heads[projection]))
        return value

    def fingerprint(self) -> str:
        """Return what :func:`lavintk.models.sources.fingerprint` makes of the file, tokenizer included."""
        return fingerprint({self.path: self._header.length}, self._header.tensors.values())

    def close(self) -> None:
        """Do nothing: no file is held open."""

    def _value(self, key: str, default: Any = None) -> Any:
        value = self._header.metadata.get(f"{self._architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{self.description} does not say its {self._architecture}.{key}")
        return value

    def _key_value_heads(self) -> int:
        heads = self._value("attention.head_count_kv", self._value("attention.head_count"))
        if isinstance(heads, list):
            if len(set(heads)) != 1:
                raise ModelError(f"{self.description}: layers with different numbers of key heads are not supported")
            heads = heads[0]
        return int(heads)

    def _biases(self) -> dict[str, bool]:
        """Return the configuration's flags for biases; Qwen2 has them without a flag."""
        if self._architecture == "qwen2":
            return {}
        flags = {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors}
        if self._architecture != "qwen3":
            flags["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self._tensors
        return flags

    def _check_number_types(self) -> None:
        tensors = self._header.tensors.values()
        hopeless = {kind for kind in {tensor.dtype for tensor in tensors} if not _can_dequantize(kind)}
        unreadable = [
            f"{tensor.name} is of type {tensor.dtype}, which the gguf package cannot dequantize"
            for tensor in tensors
            if tensor.dtype in hopeless
        ]
        if unreadable:
            raise CheckpointError(self.description, unreadable, "Take another quantization of the model.")

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        rotated = int(self._value("rope.dimension_count", head_dim))
        if rotated != head_dim:
            raise ModelError(f"{self.description} rotates {rotated} of {head_dim} dimensions of a head: not supported")
        theta = _shortest(self._value("rope.freq_base", 10000.0))
        if ROPE_FREQUENCIES in self._header.tensors:
            divisors = _dequantized(self._header.tensors[ROPE_FREQUENCIES]).numpy()
            return {"rope_theta": theta, **_llama3_scaling(divisors, theta, head_dim, self.description)}
        kind = self._value("rope.scaling.type", "none")
        factor = _shortest(self._value("rope.scaling.factor", self._value("rope.scale_linear", 1.0)))
        if factor == 1.0 or (kind == "none" and "rope.scale_linear" not in self._keys()):
            return {"rope_type": "default", "rope_theta": theta}
        if kind in ("none", "linear"):
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if kind == "yarn":
            original = int(self._value("rope.scaling.original_context_length"))
            scaling = {"factor": factor, "original_max_position_embeddings": original}
            return {"rope_type": "yarn", "rope_theta": theta, **scaling}
        raise ModelError(f"{self.description} uses rope scaling {kind!r}: not supported, only linear, yarn and llama3")

    def _keys(self) -> set[str]:
        return {key.removeprefix(f"{self._architecture}.") for key in self._header.metadata}


_SPECIAL_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
_MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def _supported_architecture(metadata: dict[str, Any], description: str) -> str:
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{description} holds architecture {architecture!r}; from GGUF files lavintk reads "
            f"{', '.join(ARCHITECTURES)}. Other models: give their Hugging Face folder or hub id."
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise ModelError(f"{description} is a mixture of experts, which lavintk does not train")
    parts = int(metadata.get("split.count", 1) or 1)
    if parts > 1:
        raise ModelError(f"{description} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    return architecture


def _hugging_face_names(architecture: str, layers: int) -> dict[str, str]:
    """Return every tensor name the architecture may have, GGUF to Hugging Face."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH[architecture.upper()], layers)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        modules += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        modules += [f"{prefix}.self_attn.{part}" for part in attention]
        modules += [f"{prefix}.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    pairs = ((table.get_name(module), module) for module in modules)
    suffixes = ("weight", "bias")
    return {f"{stored}.{suffix}": f"{module}.{suffix}" for stored, module in pairs if stored for suffix in suffixes}


def _can_dequantize(kind: str) -> bool:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    code = GGMLQuantizationType[kind]
    block = np.zeros((1, GGML_QUANT_SIZES[code][1]), dtype=np.uint8)
    try:
        dequantize(block.view(_item_type(kind)), code)
    except NotImplementedError:
        return False
    return True


def _item_type(kind: str) -> Any:
    """Return the numpy type in which ``gguf.quants`` takes tensors of a kind."""
    import numpy as np

    return {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)


def _dequantized(tensor: StoredTensor) -> torch.Tensor:
    """Return a tensor in fp32, read and dequantized some rows at a time."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.dtype]
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = prod(tensor.shape) // max(columns, 1)
    result = torch.empty((rows, columns), dtype=torch.float32)
    target = result.numpy()
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = file.read(tensor.nbytes // rows * count)
            if len(raw) * rows != tensor.nbytes * count:
                raise OSError(f"the file ends within {tensor.name}")
            target[first : first + count] = dequantize(
                np.frombuffer(raw, dtype=_item_type(tensor.dtype)).reshape(count, -1), kind
            )
    return result.reshape(tensor.shape)


def _unpermuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of query or key rows, ``[heads * head_dim, ...]``.

    A head's rows are stored as pairs (i, i + head_dim / 2); Hugging Face keeps one half after the other.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _llama3_scaling(divisors: NDArray[np.float32], theta: float, head_dim: int, description: str) -> dict[str, Any]:
    """Return the parameters of Llama 3's rope scaling that give these divisors of the frequencies.

    The file keeps the divisors only. The published models differ in the factor, which is the largest divisor,
    and share the rest; a guess that does not reproduce all divisors is refused.
    """
    import numpy as np

    factor = float(f"{divisors.max():.4g}")  # computed in fp32 by some writers
    if factor == 1.0:
        return {"rope_type": "default"}
    low, high, original = 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelError(f"{description} scales its rotary frequencies in a way that lavintk does not know")
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
