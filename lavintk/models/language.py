"""Builds a language model or a vision tower from a weight source, one tensor at a time.

The graph is made on the meta device. Each weight is read, moved to its device, quantized if it belongs to a linear
layer of the stack, and forgotten; so neither host nor device ever holds the 16-bit model.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from lavintk.contracts import Quantizer
from lavintk.dense import DenseQuantizer
from lavintk.errors import ModelError
from lavintk.layers import FrozenLinear, PackedWeight
from lavintk.models.attention import IMPLEMENTATION
from lavintk.models.decoder_layer import replace_norms
from lavintk.models.sources import WeightSource, check_names
from lavintk.models.staging import places, read_ahead
from lavintk.models.vocabulary import TABLES, check_plain, outline_table, pieces, put_table, quantize_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lavintk.models.quantized_base import QuantizedBase
    from lavintk.models.stream import LayersOutside

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
    trained_in: torch.dtype | None = None,
    stream: bool = False,
    readers: int | None = None,
    embed_quantizer: Quantizer | None = None,
    kept: QuantizedBase | None = None,
    outside: LayersOutside | None = None,
) -> nn.Module:
    """Return transformers' causal LM with frozen, quantized linear layers on ``device``.

    Norms are kept in ``dtype``, and so are embedding and output head unless there is a quantizer for them.

    :param trained_in: weights are rounded to this type first, so that they are quantized to the same codes as where
        the model was trained.
    :param stream: linear layers are read and quantized whenever they are asked for, instead of being held.
    :param readers: threads that read; None means as many as suit the device.
    :param embed_quantizer: stores embedding and head in blocks of rows, see :mod:`lavintk.models.vocabulary`.
    :param kept: what these arguments made once, ``dtype`` and ``device`` perhaps aside: values come from there, what is
        not quantized is cast to ``dtype``, and no weight of ``source`` is read.
    :param outside: takes the linear layers' storage off the device, a decoder layer at a time; the model's attribute
        ``layer_stream`` brings it back.
    :raises ModelError: not a Llama-like decoder, or its embedding or head cannot be stored so.
    :raises CheckpointError: tensors missing, unexpected, misshapen or unreadable; all listed.
    """
    model, ignore = _empty_language_model(source, dtype)
    if embed_quantizer is not None:
        check_plain(model)
    if outside is not None:
        outside.expect(model.config.num_hidden_layers)
    if kept is not None:
        _outline_tables(model, embed_quantizer, dtype)
        if outside is not None:
            outside.stored = kept.layer_bytes
        kept.fill(
            model, quantizer, embed_quantizer, device=device, dtype=dtype, progress=progress, stream=stream,
            readers=readers, place=None if outside is None else outside.place,
        )  # fmt: skip
    else:
        fill(
            model, source, quantizer, LANGUAGE_STACK, ignore,
            device=device, dtype=dtype, progress=progress, trained_in=trained_in, stream=stream, readers=readers,
            embed_quantizer=embed_quantizer, place=None if outside is None else outside.place,
        )  # fmt: skip
    if outside is not None:
        model.layer_stream = outside.put_into(model)
    if model.config.tie_word_embeddings and embed_quantizer is None:
        model.lm_head.weight = model.model.embed_tokens.weight
    # its frequencies are a buffer that no checkpoint holds
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return cast(nn.Module, model.requires_grad_(False))


def outline_language_model(source: WeightSource, embed_quantizer: Quantizer | None = None) -> nn.Module:
    """Return the model of :func:`load_language_model` on the meta device: all of it but the values.

    Linear layers are plain ones there; embedding and head have the storage that ``embed_quantizer`` gives them.

    :raises LavintkError: as :func:`load_language_model`, as far as names and shapes show.
    """
    model, ignore = _empty_language_model(source, torch.float32)
    check_names(source, _shapes(model), ignore)
    if embed_quantizer is not None:
        check_plain(model)
    _outline_tables(model, embed_quantizer, torch.float32)
    return _outline(model, LANGUAGE_STACK)


def _outline_tables(model: Any, embed_quantizer: Quantizer | None, dtype: torch.dtype) -> None:
    """Put tables without values where loading puts quantized ones."""
    if embed_quantizer is None:
        return
    for name in TABLES[: 1 if model.config.tie_word_embeddings else 2]:
        rows, columns = model.get_parameter(name).shape
        put_table(model, name, outline_table(rows, columns, embed_quantizer), dtype)


def _empty_language_model(source: WeightSource, dtype: torch.dtype) -> tuple[Any, Callable[[str], bool]]:
    """Return the model on the meta device, and which names may be missing or left over."""
    from transformers import AutoModelForCausalLM

    config = language_config(source)
    config._attn_implementation = IMPLEMENTATION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        replace_norms(model)
    _require_stack(model, source.description)
    tied = bool(config.tie_word_embeddings)

    def ignore(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    return model, ignore


def load_vision_model(
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantizer: Quantizer | None = None,
    trained_in: torch.dtype | None = None,
) -> nn.Module:
    """Return ``CLIPVisionModel`` or ``SiglipVisionModel`` from a vision folder or from a whole CLIP's.

    :raises ModelError: not a CLIP-like tower.
    :raises CheckpointError: see :func:`load_language_model`.
    """
    model, bare, ignore = _empty_vision_model(source, dtype)
    fill(
        model, bare, quantizer or DenseQuantizer(), VISION_STACK, ignore,
        device=device, dtype=dtype, trained_in=trained_in,
    )  # fmt: skip
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

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read one tensor."""
        return self._source.read(self._stored[name], into)


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
    trained_in: torch.dtype | None = None,
    stream: bool = False,
    readers: int | None = None,
    embed_quantizer: Quantizer | None = None,
    place: Callable[[str, FrozenLinear], None] | None = None,
) -> None:
    """Give every parameter of ``model`` (on the meta device) its value from ``source``.

    :param stack: linear layers whose name starts so become frozen layers made by ``quantizer``; the rest of the
        parameters are stored in ``dtype``.
    :param ignore: names that may be absent or superfluous.
    :param trained_in: see :func:`load_language_model`.
    :param stream: put :class:`StreamedLinear` in place of ``quantizer``'s layers.
    :param readers: see :func:`load_language_model`.
    :param embed_quantizer: see :func:`load_language_model`.
    :param place: takes ``quantizer``'s layers by their names; None puts them into ``model``.
    """
    expected = _shapes(model)
    check_names(source, expected, ignore)  # type: ignore[arg-type]
    linears = _linears(model, stack)
    total, done = source.nbytes(), 0
    present = set(source.names())
    waiting: dict[str, Tensor] = {}  # biases, which come before their weights
    # layer by layer, so that what has been read is soon complete and a progress bar moves evenly
    names = sorted((name for name in expected if name in present), key=_in_order)
    first, on_cpu = trained_in or dtype, device.type == "cpu"

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(first).to(dtype)

    def read(name: str, into: Tensor | None = None) -> Tensor:
        stored = source.read(name, into)
        if on_cpu:
            return rounded(stored)  # by the threads that read
        # the device casts faster, but what becomes narrower would take room there beside its copy
        return stored.to(first) if first.itemsize < stored.dtype.itemsize else stored

    if embed_quantizer is not None:
        for name in (name for name in names if name in TABLES):
            _put_table(model, source, name, embed_quantizer, lambda piece: rounded(piece.to(device)), dtype)
            done += source.tensor_nbytes(name)
            if progress is not None:
                progress(done, total)
        names = [name for name in names if name not in TABLES]
    if stream:
        _stream(model, linears, names, lambda name: rounded(source.read(name)), quantizer)
        names = [name for name in names if name.rpartition(".")[0] not in linears]
    sizes = [(name, source.tensor_nbytes(name)) for name in names]
    put = place or model.set_submodule
    with places(device, readers) as ring:
        for name, tensor in read_ahead(read, sizes, ring):
            module_name, _, leaf = name.rpartition(".")
            tensor = tensor if on_cpu else rounded(tensor)
            if module_name not in linears:
                setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))
            elif leaf == "bias":
                waiting[module_name] = tensor
            else:
                put(module_name, quantizer.quantize(tensor, waiting.pop(module_name, None)))
            del tensor
            done += source.tensor_nbytes(name)
            if progress is not None:
                progress(done, total)


def _put_table(
    model: Any,
    source: WeightSource | Prefixless,
    name: str,
    quantizer: Quantizer,
    prepare: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """Read embedding or head and quantize it block by block, so that one block at a time is on the device in full.

    A head that is stored though it is tied is not read.

    :param prepare: puts rows on the device and rounds them.
    :param dtype: of the embeddings.
    """
    if model.config.tie_word_embeddings and name != TABLES[0]:
        return
    rows = map(prepare, pieces(source.read(name)))
    put_table(model, name, quantize_table(rows, quantizer), dtype)


def _stream(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    names: list[str],
    read: Callable[[str], Tensor],
    quantizer: Quantizer,
) -> None:
    """Put a layer in the place of each of ``linears`` that reads its weight when it is asked."""
    recent = RecentLayers()
    for name, linear in linears.items():
        bias = read(f"{name}.bias") if f"{name}.bias" in names else None

        def make(name: str = name, bias: Tensor | None = bias) -> FrozenLinear:
            return quantizer.quantize(read(f"{name}.weight"), bias)

        _put(model, name, StreamedLinear(linear.out_features, linear.in_features, bias, make, recent))


class RecentLayers:
    """The layers that were asked for last: who goes through a model layer by layer asks for one several times."""

    def __init__(self, kept: int = 8) -> None:
        self._kept = kept
        self._layers: OrderedDict[int, FrozenLinear] = OrderedDict()

    def get(self, key: int, make: Callable[[], FrozenLinear]) -> FrozenLinear:
        """Return the layer of ``key``, made anew unless it is among those kept."""
        if key in self._layers:
            self._layers.move_to_end(key)
            return self._layers[key]
        while len(self._layers) >= self._kept:  # before the new one is made, so that one less is in memory
            self._layers.popitem(last=False)
        self._layers[key] = layer = make()
        return layer


class StreamedLinear(FrozenLinear):
    """A frozen layer that is read from the checkpoint and quantized whenever it is needed, and soon forgotten.

    For going through a model that is too large for memory, layer by layer. Its ``state_dict`` holds the bias only.
    """

    graph_safe = False

    def __init__(
        self,
        out_features: int,
        in_features: int,
        bias: Tensor | None,
        make: Callable[[], FrozenLinear],
        recent: RecentLayers,
    ) -> None:
        super().__init__(out_features, in_features, bias)
        self._make, self._recent = make, recent

    def layer(self) -> FrozenLinear:
        """Return the quantized layer."""
        return self._recent.get(id(self), self._make)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[out, in]``."""
        return self.layer().dequantize(dtype)

    def packed(self) -> PackedWeight:
        """Describe the quantized layer's storage."""
        return self.layer().packed()

    def bits_per_weight(self) -> float:
        """Return the bits that the quantized layer stores per weight."""
        return self.layer().bits_per_weight()


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
