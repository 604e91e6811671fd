"""Builds a language model or a vision tower from a weight source, one tensor at a time.

The graph is made on the meta device. Each weight is read, moved to its device, quantized if it belongs to a linear
layer of the stack, and forgotten; so neither host nor device ever holds the 16-bit model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from lavintk.contracts import Quantizer
from lavintk.dense import DenseQuantizer
from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.sources import WeightSource, check_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LANGUAGE_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Tested ``model_type`` values. Others of the same structure are tried and may work."""
VISION_TYPES = ("clip_vision_model", "siglip_vision_model")


class Progress(Protocol):
    """Told how many bytes of the checkpoint have been read."""

    def __call__(self, done: int, total: int) -> None:
        """Report ``done`` of ``total`` bytes."""
        ...


def load_language_model(
    source: WeightSource,
    quantizer: Quantizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> nn.Module:
    """Return transformers' causal LM with frozen, quantized linear layers on ``device``.

    Embedding, norms and output head are kept in ``dtype``.

    :raises ModelError: not a Llama-like decoder.
    :raises CheckpointError: tensors missing, unexpected, misshapen or unreadable; all listed.
    """
    from transformers import AutoModelForCausalLM

    config = source.config()
    _require_decoder(config, source.description)
    config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _require_stack(model, source.description)
    tied = bool(config.tie_word_embeddings)

    def ignore(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    fill(model, source, quantizer, "model.layers.", ignore, device=device, dtype=dtype, progress=progress)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    # its frequencies are a buffer that no checkpoint holds
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return cast(nn.Module, model.requires_grad_(False))


def load_vision_model(
    source: WeightSource, *, device: torch.device, dtype: torch.dtype, quantizer: Quantizer | None = None
) -> nn.Module:
    """Return ``CLIPVisionModel`` or ``SiglipVisionModel`` from a vision folder or from a whole CLIP's.

    :raises ModelError: not a CLIP-like tower.
    :raises CheckpointError: see :func:`load_language_model`.
    """
    from transformers import AutoModel

    config = source.config()
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_TYPES:
        raise ModelError(
            f"{source.description} holds a {config.model_type!r}, not a vision tower; "
            f"lavintk takes CLIP and SigLIP ({', '.join(VISION_TYPES)})"
        )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype)
    # features are tapped before the last norm, so it and a pooling head are dead weight
    model.post_layernorm = nn.Identity()
    model.head = nn.Identity()

    def ignore(name: str) -> bool:
        unused = ("post_layernorm.", "head.", "text_model.", "visual_projection.", "text_projection.")
        return name.endswith("position_ids") or name.startswith(unused) or name in ("logit_scale", "logit_bias")

    quantizer = quantizer or DenseQuantizer()
    fill(model, Prefixless(source, "vision_model."), quantizer, "encoder.layers.", ignore, device=device, dtype=dtype)
    embeddings = model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0], device=device)[None]
    return cast(nn.Module, model.requires_grad_(False))


class Prefixless:
    """A source whose names lose a prefix: CLIP folders differ in whether they write ``vision_model.``."""

    def __init__(self, source: WeightSource, prefix: str) -> None:
        self._source = source
        self._stored = {name.removeprefix(prefix): name for name in source.names()}
        self.description = source.description

    def names(self) -> list[str]:
        """Return the names without the prefix."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._source.shape(self._stored[name])

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return self._source.nbytes()

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return self._source.tensor_nbytes(self._stored[name])

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._source.read(self._stored[name])


def fill(
    model: nn.Module,
    source: WeightSource | Prefixless,
    quantizer: Quantizer,
    stack: str,
    ignore: Callable[[str], bool],
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Give every parameter of ``model`` (on the meta device) its value from ``source``.

    :param stack: linear layers whose name starts so become frozen layers made by ``quantizer``; the rest of the
        parameters are stored in ``dtype``.
    :param ignore: names that may be absent or superfluous.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    check_names(source, expected, ignore)  # type: ignore[arg-type]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(stack)}
    total, done = source.nbytes(), 0
    # layer by layer, so that what has been read is soon complete and a progress bar moves evenly
    for name in sorted((n for n in expected if n in set(source.names())), key=_in_order):
        module_name, _, leaf = name.rpartition(".")
        if module_name in linears:
            if leaf == "weight":
                has_bias = linears[module_name].bias is not None
                bias = _read(source, f"{module_name}.bias", device, dtype) if has_bias else None
                weight = _read(source, name, device, dtype)
                _put(model, module_name, quantizer.quantize(weight, bias))
                del weight
        else:
            parameter = nn.Parameter(_read(source, name, device, dtype), requires_grad=False)
            setattr(model.get_submodule(module_name), leaf, parameter)
        done += source.tensor_nbytes(name)
        if progress is not None:
            progress(done, total)


def _read(source: WeightSource | Prefixless, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return source.read(name).to(device=device, dtype=dtype)


def _put(model: nn.Module, name: str, layer: FrozenLinear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def _require_decoder(config: PretrainedConfig, description: str) -> None:
    if config.model_type in LANGUAGE_TYPES:
        return
    architectures = ", ".join(config.architectures or ["unknown"])
    if not any("CausalLM" in a for a in config.architectures or []):
        raise ModelError(
            f"{description} holds a {config.model_type!r} ({architectures}), which is no causal language model; "
            f"lavintk takes Llama-like decoders: {', '.join(LANGUAGE_TYPES)}"
        )


def _require_stack(model: nn.Module, description: str) -> None:
    parts = ("model.layers", "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    missing = []
    for part in parts:
        try:
            model.get_submodule(part)
        except AttributeError:
            missing.append(part)
    if missing:
        raise ModelError(
            f"{description}: {type(model).__name__} lacks {', '.join(missing)}, so it is not Llama-like; "
            f"tested are {', '.join(LANGUAGE_TYPES)}"
        )
