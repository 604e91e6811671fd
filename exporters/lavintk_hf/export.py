"""Writes a trained run as a folder that transformers loads."""

from __future__ import annotations

import copy
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from safetensors.torch import save_file

from lavintk.checkpoints import CONNECTOR
from lavintk.data.exported import exported_tokenizer, renders_as_trained, write_generation_config
from lavintk.errors import ModelError
from lavintk.merge import IMAGE, LANGUAGE, TEXT, PlainModel, load_on_cpu, pick_condition, tensors, with_biases
from lavintk.models.catalog import locate
from lavintk.models.connector import PatchProjector
from lavintk.models.sources import open_source
from lavintk_hf.card import Card, Kind, write_card
from lavintk_hf.llava import write_llava
from lavintk_hf.shards import DTYPES, write_sharded
from lavintk_hf.vision import write_vision

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lavintk.models.build import Assembly
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run
    from lavintk_hf import HfOptions

LLAMA = "LlamaForCausalLM"
"""What a model becomes whose own class has no room for the fold's biases, see :func:`lavintk.merge.with_biases`."""


class HfExporter:
    """The merged model: a causal LM, or a LLaVA where the tower gives patches."""

    def __init__(self, options: HfOptions) -> None:
        self.options = options
        self.shard_bytes = int(options.shard_gb * 10**9)

    def export(self, run: Run, out: Path) -> None:
        """Write weights, configuration, tokenizer and ``README.md`` into the new folder ``out``.

        :raises NotAffineError: the adapter has no affine form.
        :raises ModelError: the architecture lacks biases that the fold needs, or there is no tower for
            ``condition=image``.
        """
        assembly = load_on_cpu(run)
        model = assembly.model
        wanted = self._modality(assembly)
        condition, dtype = pick_condition(model, wanted), self._dtype(run)
        plain = PlainModel(model, condition)
        kind = _kind(assembly, wanted)
        if model.vision is not None and kind != "llava":
            where = "; vision tower and neck lie beside the text model" if kind == "taps" else ""
            click.echo(f"left out of what transformers loads: images{where}")
        tokenizer = exported_tokenizer(assembly, images=kind == "llava")
        out.mkdir(parents=True, exist_ok=True)
        if kind == "llava":
            write_llava(run, assembly, plain, tokenizer, out, dtype, self.shard_bytes)
        else:
            self._write_text(assembly, plain, out, dtype)
            write_generation_config(out, assembly, locate(run.recipe.model.language))
        if kind == "taps":
            self._write_parts(run, assembly, out, dtype)
        tokenizer.save_pretrained(out)
        exact = renders_as_trained(assembly, tokenizer)
        write_card(out, run, assembly, Card(kind, condition, str(dtype).removeprefix("torch."), exact))

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        """Return the bytes of the language model's weights; see :class:`lavintk.contracts.SizedExporter`."""
        linears, others = outline.linears(), outline.frozen_shapes()
        count = sum(m.out_features * m.in_features for n, m in linears.items() if n.startswith(LANGUAGE))
        tied = bool(outline.language.config.tie_word_embeddings)
        count += sum(
            prod(shape)
            for n, shape in others.items()
            if n.startswith(LANGUAGE) and not (tied and n.endswith("lm_head.weight"))
        )
        return count * self._dtype(run).itemsize

    def _modality(self, assembly: Assembly) -> str:
        """Return the modality whose weights are written."""
        if self.options.condition == "auto":
            return IMAGE if isinstance(assembly.model.connector, PatchProjector) else TEXT
        if self.options.condition == IMAGE and assembly.model.vision is None:
            raise ModelError("condition=image was asked for, but the run has no vision tower; use condition=text")
        return self.options.condition

    def _dtype(self, run: Run) -> torch.dtype:
        """Return the type to write: the base's own unless another is asked for."""
        if self.options.dtype != "auto":
            return DTYPES[self.options.dtype]
        stored = open_source(run.recipe.model.language).config().dtype
        return next((dtype for dtype in DTYPES.values() if dtype == stored), torch.bfloat16)

    def _write_text(self, assembly: Assembly, plain: PlainModel, out: Path, dtype: torch.dtype) -> None:
        language = assembly.model.language
        config, shapes = with_biases(language.config, plain.biased())
        write_sharded(out, shapes, tensors(plain, shapes), dtype, self.shard_bytes)
        architecture = type(language).__name__ if config.model_type == language.config.model_type else LLAMA
        save_config(config, architecture, out, dtype)

    def _write_parts(self, run: Run, assembly: Assembly, out: Path, dtype: torch.dtype) -> None:
        """Write what transformers has no architecture for: the tower and LaVIN's neck, each by itself."""
        connector = assembly.model.connector
        assert connector is not None
        write_vision(run, assembly, out / "vision", dtype, self.shard_bytes)
        trained = {n: p.detach().contiguous().cpu() for n, p in connector.named_parameters()}
        save_file(trained, out / CONNECTOR, metadata={"format": "pt"})


def _kind(assembly: Assembly, wanted: str) -> Kind:
    """Return what the folder becomes."""
    if isinstance(assembly.model.connector, PatchProjector):
        return "llava" if wanted == IMAGE else "text"
    return "text" if assembly.model.vision is None else "taps"


def save_config(config: PretrainedConfig, architecture: str, out: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` of a model of the class ``architecture``."""
    saved: Any = copy.deepcopy(config)
    saved.architectures, saved.dtype = [architecture], dtype
    saved.save_pretrained(out)
