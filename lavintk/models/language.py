"""Builds a language model or a vision tower from a weight source, one tensor at a time.

The graph is made on the meta device. Each weight is read, moved to its device, quantized if it belongs to a linear
layer of the stack, and forgotten; so neither host nor device ever holds the 16-bit model.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, cast

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
LANGUAGE_STACK, VISION_STACK = "model.layers.", "encoder.layers."
"""How the names of the layers that are quantized begin."""
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
    model, ignore = _empty_language_model(source, dtype)
    fill(model, source, quantizer, LANGUAGE_STACK, ignore, device=device, dtype=dtype, progress=progress)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # its frequencies are a buffer that no checkpoint holds
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return cast(nn.Module, model.requires_grad_(False))


def outline_language_model(source: WeightSource) -> nn.Module:
    """Return the model of :func:`load_language_model` on the meta device: all of it but the values.

    :raises LavintkError: as :func:`load_language_model`, as far as names and shapes show.
    """
    model, ignore = _empty_language_model(source, torch.float32)
    check_names(source, _shapes(model), ignore)
    return _outline(model, LANGUAGE_STACK)


def _empty_language_model(source: WeightSource, dtype: torch.dtype) -> tuple[Any, Callable[[str], bool]]:
    """Return the model on the meta device, and which names may be missing or left over."""
    from transformers import AutoModelForCausalLM

    config = language_config(source)
    config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _require_stack(model, source.description)
    tied = bool(config.tie_word_embeddings)

    def ignore(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return model, ignore


def load_vision_model(
    source: WeightSource, *, device: torch.device, dtype: torch.dtype, quantizer: Quantizer | None = None
) -> nn.Module:
    """Return ``CLIPVisionModel`` or ``SiglipVisionModel`` from a vision folder or from a whole CLIP's.

    :raises ModelError: not a CLIP-like tower.
    :raises CheckpointError: see :func:`load_language_model`.
    """
    model, bare, ignore = _empty_vision_model(source, dtype)
    fill(model, bare, quantizer or DenseQuantizer(), VISION_STACK, ignore, device=device, dtype=dtype)
    embeddings = model.embeddings
    embeddings.position_ids = torch.arange(embeddings.position_embedding.weight.shape[0], device=device)[None]
    return cast(nn.Module, model.requires_grad_(False))


def outline_vision_model(source: WeightSource) -> nn.Module:
    """Return the model of :func:`load_vision_model` on the meta device: all of it but the values.

    :raises LavintkError: as :func:`load_vision_model`, as far as names and shapes show.
    """
    model, bare, ignore = _empty_vision_model(source, torch.float32)
    check_names(bare, _shapes(model), ignore)  # type: ignore[arg-type]
    return _outline(model, VISION_STACK)


def _empty_vision_model(source: WeightSource, dtype: torch.dtype) -> tuple[Any, Prefixless, Callable[[str], bool]]:
    """Return the tower on the meta device, its source, and which names may be missing or left over."""
    from transformers import AutoModel

    config = vision_config(source)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype)
    # features are tapped before the last norm, so it and a pooling head are dead weight
    model.post_layernorm = nn.Identity()
    model.head = nn.Identity()

    def ignore(name: str) -> bool:
        unused = ("post_layernorm.", "head.", "text_model.", "visual_projection.", "text_projection.")
        return name.endswith("position_ids") or name.startswith(unused) or name in ("logit_scale", "logit_bias")

    return model, Prefixless(source, "vision_model."), ignore


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _linears(model: nn.Module, stack: str) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(stack)}


def _outline(model: nn.Module, stack: str) -> nn.Module:
    """Put frozen layers without values where loading puts quantized ones."""
    for name, linear in _linears(model, stack).items():
        _put(model, name, DenseQuantizer().quantize(linear.weight.detach(), linear.bias))
    return model.requires_grad_(False)


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
    expected = _shapes(model)
    check_names(source, expected, ignore)  # type: ignore[arg-type]
    linears = _linears(model, stack)
    total, done = source.nbytes(), 0
    present = set(source.names())
    waiting: dict[str, Tensor] = {}  # biases, which come before their weights
    # layer by layer, so that what has been read is soon complete and a progress bar moves evenly
    names = sorted((name for name in expected if name in present), key=_in_order)
    for name, tensor in read_ahead(source, names, dtype):
        module_name, _, leaf = name.rpartition(".")
        tensor = tensor.to(device)
        if module_name not in linears:
            setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))
        elif leaf == "bias":
            waiting[module_name] = tensor
        else:
            _put(model, module_name, quantizer.quantize(tensor, waiting.pop(module_name, None)))
        del tensor
        done += source.tensor_nbytes(name)
        if progress is not None:
            progress(done, total)


def read_ahead(
    source: WeightSource | Prefixless, names: list[str], dtype: torch.dtype, ahead: int = 3
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` in order, reading from disk while the caller quantizes.

    Two threads read, neighbours on disk at a time, and cast to ``dtype``, so that disk, host and device do not wait for
    each other. At most ``ahead`` tensors are held besides the caller's.
    """

    def read(name: str) -> Tensor:
        return source.read(name).to(dtype)

    pool = ThreadPoolExecutor(2, thread_name_prefix="lavintk-weights")
    pending: deque[tuple[str, Future[Tensor]]] = deque()
    try:
        for name in names:
            pending.append((name, pool.submit(read, name)))
            if len(pending) >= ahead:
                ready, future = pending.popleft()
                yield ready, future.result()
        while pending:
            ready, future = pending.popleft()
            yield ready, future.result()
    finally:  # also when quantizing fails
        pool.shutdown(wait=False, cancel_futures=True)


def _put(model: nn.Module, name: str, layer: FrozenLinear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]


def language_config(source: WeightSource) -> PretrainedConfig:
    """Return the configuration of a Llama-like decoder.

    :raises ModelError: it is something else; says what.
    """
    config = source.config()
    architectures = config.architectures or []
    if config.model_type in LANGUAGE_TYPES or any("CausalLM" in name for name in architectures):
        return config
    tower = config.model_type in VISION_TYPES or hasattr(config, "vision_config")
    raise ModelError(
        f"{source.description} holds a {config.model_type!r} ({', '.join(architectures) or 'unknown'}), which is no "
        f"Llama-like language model; lavintk takes {', '.join(LANGUAGE_TYPES)} and what is built like them."
        + (" A vision tower is named with --vision (model.vision)." if tower else "")
    )


def vision_config(source: WeightSource) -> PretrainedConfig:
    """Return the configuration of a CLIP-like vision tower, alone or out of a whole CLIP's.

    :raises ModelError: it is something else; says what.
    """
    whole = source.config()
    config: PretrainedConfig = getattr(whole, "vision_config", whole)
    if config.model_type in VISION_TYPES:
        return config
    raise ModelError(
        f"{source.description} holds a {config.model_type!r}, not a vision tower; lavintk takes CLIP and SigLIP "
        f"({', '.join(VISION_TYPES)})."
        + (" A language model is named with --model (model.language)." if config.model_type in LANGUAGE_TYPES else "")
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
