"""Attaches LaVIN's adapters to a language model and a vision tower."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate
from lavintk.errors import ModelError, NotAffineError
from lavintk.models.multimodal import Manner
from lavintk.tensor_file import load_parameters
from lavintk_mma import original
from lavintk_mma.modules import AffineAdapter, BareAdapter, RoutedAdapter

if TYPE_CHECKING:
    from lavintk.layers import FrozenLinear
    from lavintk.models.multimodal import ContextHolder, MultimodalModel
    from lavintk_mma import MixtureOptions

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"
CONDITIONS = ("text", "image")
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FEED_FORWARD_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
VISION_FEED_FORWARD_INPUTS = ("mlp.fc1",)


class RoutedNorm(nn.Module):
    """A norm followed by a routed adapter that reads its weights off the modality tokens.

    The modality tokens travel through the layers as side tokens, one for each modality or one for each row. In this
    layer's normed state they feed the router; every token takes the weights of the side token it belongs to. While
    decoding from a cache there are no side tokens and the weights of the prompt pass are used again: they depend on
    the modality alone.
    """

    def __init__(self, norm: nn.Module, adapter: RoutedAdapter, context: ContextHolder) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter
        self._context = context
        self.table: Tensor | None = None
        """Routing weights ``[M, 2]`` of the last forward pass that had side tokens."""
        self.arrived: Tensor | None = None
        """The side tokens ``[M, hidden]`` as they came into the norm, while a prompt fills a cache."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[1, N + M, hidden]`` to the same shape."""
        normed = self.norm(hidden)
        context = self._context.current
        if context.side:
            self.arrived = hidden[0, -context.side :].clone() if context.cached else None
            table = self.adapter.weights(self._router_input(normed[0, -context.side :]))
            self.table = table.detach()
        elif self.table is not None:
            table = self.table
        else:
            raise RuntimeError("decoding without a prompt: the routing weights are not known yet")
        return cast(Tensor, self.adapter(normed, table.index_select(0, context.owners).unsqueeze(0)))

    def _router_input(self, normed: Tensor) -> Tensor:
        return normed


class EarlyGatedNorm(RoutedNorm):
    """LaVIN's gate of the feed-forward adapter: in generation it reads what came into the block.

    Its generator takes the weights from ``ffn_norm(x)``, x before attention; its training from ``ffn_norm(h)``,
    h behind attention. A run that fills a cache is a generation here.
    """

    def __init__(
        self, norm: nn.Module, adapter: RoutedAdapter, context: ContextHolder, attention_norm: RoutedNorm
    ) -> None:
        super().__init__(norm, adapter, context)
        # set past nn.Module's bookkeeping: it is a child of the layer already
        object.__setattr__(self, "_attention_norm", attention_norm)

    def _router_input(self, normed: Tensor) -> Tensor:
        arrived = cast(RoutedNorm, self._attention_norm).arrived
        return normed if arrived is None else cast(Tensor, self.norm(arrived))


class AffineNorm(nn.Module):
    """A norm followed by a plain adapter."""

    def __init__(self, norm: nn.Module, adapter: AffineAdapter) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., width]`` to the same shape."""
        return cast(Tensor, self.adapter(self.norm(hidden)))


class ClassTokenNorm(nn.Module):
    """A norm of the vision tower followed by a routed adapter that reads each image's own class token."""

    def __init__(self, norm: nn.Module, adapter: RoutedAdapter) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[I, tokens, width]`` to the same shape; routing weights are shared by an image's tokens."""
        normed = self.norm(hidden)
        return cast(Tensor, self.adapter(normed, self.adapter.weights(normed[:, :1])))


class FirstImageNorm(nn.Module):
    """LaVIN's gate in the vision tower: each image takes, at each position, the weights that the first image has there.

    LaVIN's router means to read position 0, but CLIP's states are laid out (positions, batch, width), so it reads
    sample 0. Features depend on who comes first in the batch; a batch of one gates each position on itself.
    """

    def __init__(self, norm: nn.Module, adapter: RoutedAdapter) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[I, positions, width]`` to the same shape."""
        normed = self.norm(hidden)
        return cast(Tensor, self.adapter(normed, self.adapter.weights(normed[:1])))


class MixtureOfModalityAdapter(nn.Module):
    """LaVIN's adapters in every decoder layer and, as chosen, in every block of the vision tower.

    Position 0 of LaVIN's sequence, the modality token, is seen by nobody and sees only itself, so its path depends on
    the modality alone. It is computed once per micro-batch and modality, as a side token; ``routing=carried`` computes
    it once per row, as LaVIN does. With dropout off both give the same numbers; with dropout a carried token draws
    its own mask in each row.
    """

    conditions: tuple[str, ...] = CONDITIONS

    def __init__(self, options: MixtureOptions) -> None:
        super().__init__()
        self.options = options
        self.language = nn.ModuleDict()
        self.visual = nn.ModuleDict()
        self._linears: dict[str, FrozenLinear] = {}
        self._norms: dict[str, RoutedNorm] = {}
        self._model: MultimodalModel | None = None

    def attach(self, model: MultimodalModel) -> None:
        """Wrap the norms in front of q, k, v (and of the feed-forward layers with ``placement=block``)."""
        self._linears = model.linears()
        # drawn on the host, as all that follows, so that a seed gives the same start on every device
        self.modality = nn.Embedding(len(CONDITIONS), model.hidden_size).to(model.device)
        for index, layer in enumerate(model.layers):
            self._wrap_language(model, layer, index, "input_layernorm", "attn")
            if self.options.placement == "block":
                self._wrap_language(model, layer, index, "post_attention_layernorm", "mlp")
        if model.vision is not None and self.options.visual != "none":
            for index, block in enumerate(model.vision.blocks):
                self._wrap_visual(model, block, index, "layer_norm1", "attn")
                if self.options.visual == "router_block":
                    self._wrap_visual(model, block, index, "layer_norm2", "mlp")
        compat, sees_first = self.options.compat == "lavin", self.options.visual in ("router", "router_block")
        model.manner = Manner(
            side_per_row=self.options.routing == "carried",
            blank_first=compat and sees_first,
            decode_shift=-1 if compat else 0,
        )
        self.language.to(model.device)
        self.visual.to(model.device)
        # set past nn.Module's bookkeeping: the model contains the adapter, so it must not become its child
        object.__setattr__(self, "_model", model)

    def side_tokens(self) -> Tensor:
        """Return the modality tokens ``[2, hidden]``: text, image."""
        return self.modality.weight

    def save(self, folder: Path, base: str) -> None:
        """Write ``adapter.safetensors`` (fp32) and ``adapter.json`` (geometry)."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().cpu() for name, p in self.named_parameters()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "lavintk-mma"})
        config = {"type": "mma", "base": base, **asdict(self.options)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; names and shapes must match exactly."""
        advice = "Was the adapter trained on another model or with other options?"
        load_parameters(folder / WEIGHTS, dict(self.named_parameters()), advice)

    def load_original(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy LaVIN's own adapter tensors into this adapter and its model's connector.

        :raises CheckpointError: see :func:`lavintk_mma.original.load_original`.
        """
        original.load_original(self._attached(), tensors)

    def pair_with_original(self, names: Mapping[str, object]) -> dict[str, str | None]:
        """Return the model's trainable name of each of LaVIN's names; None where there is none."""
        return original.pair_with_original(self._attached(), names)

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        """Yield what the adapters add to each linear layer they feed, per modality (RepAdapter's fold).

        The adapter maps the normed state x to ``x + up (down x) + k``; a linear layer W behind it sees the update
        ``(W up) (down x) + W k``.
        """
        visual = self._fed(self.visual, "vision.model.encoder.layers", VISION_FEED_FORWARD_INPUTS, prefix)
        if visual:
            self._check_visual_folds()
        language = self._fed(self.language, "language.model.layers", FEED_FORWARD_INPUTS, prefix)
        tables = self.routing() if language else {}
        for key, names in language.items():
            adapter = cast(RoutedAdapter, self.language[key])
            effects = {name: adapter.affine(weights) for name, weights in zip(CONDITIONS, tables[key])}
            for name in names:
                yield from self._through(name, effects)
        for key, names in visual.items():
            effects = {"image": cast(AffineAdapter, self.visual[key]).affine()}
            for name in names:
                yield from self._through(name, effects)

    @torch.no_grad()
    def routing(self) -> dict[str, Tensor]:
        """Return the routing weights ``[conditions, 2]`` of each adapter in eval mode, by ``<layer>_<place>``.

        The side tokens run in fp32 for it, so that what is folded does not depend on the type that the model is loaded
        in. A forward pass of a model in 16 bits takes them along in 16 bits, which moves its logits by less than its
        other rounding does.
        """
        model = self._attached()
        was_training = model.training
        model.eval().run_side_tokens()
        model.train(was_training)
        return {key: cast(Tensor, norm.table) for key, norm in self._norms.items()}

    def _attached(self) -> MultimodalModel:
        if self._model is None:
            raise ModelError("the adapter is not attached to a model yet")
        return self._model

    def _wrap_language(self, model: MultimodalModel, layer: nn.Module, index: int, norm: str, place: str) -> None:
        if not hasattr(layer, norm):
            raise ModelError(f"{type(layer).__name__} has no {norm}: the mma adapter fits Llama-like layers only")
        o = self.options
        adapter = RoutedAdapter(model.hidden_size, o.dim, o.groups, o.scale, o.temperature, o.dropout)
        if o.compat == "lavin" and place == "mlp":
            attention_norm = self._norms[f"{index}_attn"]
            routed: RoutedNorm = EarlyGatedNorm(getattr(layer, norm), adapter, model.context, attention_norm)
        else:
            routed = RoutedNorm(getattr(layer, norm), adapter, model.context)
        self.language[f"{index}_{place}"] = adapter
        self._norms[f"{index}_{place}"] = routed
        setattr(layer, norm, routed)

    def _wrap_visual(self, model: MultimodalModel, block: nn.Module, index: int, norm: str, place: str) -> None:
        assert model.vision is not None
        o, width = self.options, model.vision.width
        inner = getattr(block, norm)
        wrapped: nn.Module
        if o.visual in ("affine", "normal"):
            kind = AffineAdapter if o.visual == "affine" else BareAdapter
            plain = kind(width, o.dim, o.groups, o.scale, o.dropout)
            self.visual[f"{index}_{place}"] = plain
            wrapped = AffineNorm(inner, plain)
        elif o.compat == "none" and not model.vision.has_class_token:
            raise ModelError(
                f"visual adapters of kind {o.visual!r} read a class token, which {type(model.vision.model).__name__} "
                "has not; use --adapter mma:visual=affine"
            )
        else:
            routed = RoutedAdapter(width, o.dim, o.groups, o.scale, o.temperature, o.dropout)
            self.visual[f"{index}_{place}"] = routed
            wrapped = FirstImageNorm(inner, routed) if o.compat == "lavin" else ClassTokenNorm(inner, routed)
        setattr(block, norm, wrapped)

    @staticmethod
    def _fed(adapters: nn.ModuleDict, layers: str, feed_forward: tuple[str, ...], prefix: str) -> dict[str, list[str]]:
        """Return by adapter the linear layers that it feeds and whose names begin with ``prefix``."""
        fed = {}
        for key in adapters:
            index, place = key.split("_")
            leaves = ATTENTION_INPUTS if place == "attn" else feed_forward
            names = [f"{layers}.{index}.{leaf}" for leaf in leaves]
            if names := [name for name in names if name.startswith(prefix)]:
                fed[key] = names
        return fed

    def _check_visual_folds(self) -> None:
        if self.options.visual == "normal":
            raise NotAffineError(
                "visual adapters of kind 'normal' replace the linear layers' input instead of adding to it and have no "
                "low-rank update; train with --adapter mma:visual=affine to export them folded"
            )
        if self.options.visual != "affine":
            raise NotAffineError(
                f"visual adapters of kind {self.options.visual!r} depend on the image and do not fold; "
                "train with --adapter mma:visual=affine to export them folded"
            )

    @torch.no_grad()
    def _through(self, name: str, effects: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> list[AffineUpdate]:
        """Return, for each condition, what ``(down, up, bias)`` in front of a linear layer adds behind it."""
        weight = self._linears[name].dequantize(torch.float32)
        return [
            AffineUpdate(
                name, condition, down.detach().to(torch.float32, copy=True), weight @ up.float(), weight @ bias.float()
            )
            for condition, (down, up, bias) in effects.items()
        ]
