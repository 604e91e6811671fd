"""PEFT's layers in the places of frozen ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate
from lavintk.errors import CheckpointError, ModelError, OptionsError
from lavintk.layers import FrozenLinear
from lavintk.merge import LANGUAGE, VISION
from lavintk.targets import peft_targets, select_linears
from lavintk_peft.files import fill_part, read_part, save_part
from lavintk_peft.view import view_of

if TYPE_CHECKING:
    from lavintk.models.multimodal import MultimodalModel
    from lavintk_peft import PeftOptions

VISION_FOLDER = "vision"
"""Where the vision tower's part lies within the adapter's folder: it is another model to PEFT."""
CAUSAL_LM = "CAUSAL_LM"
FEEDFORWARD = ("down_proj", "fc2")
"""Layers whose inputs IA3 scales instead of their outputs: the second ones of feed-forward parts."""
DORA_GRADIENT = "DoRA takes the norm that it divides by as a constant (arXiv 2402.09353, section 4.3)"
NAME = "default"
"""What PEFT calls the one adapter of a model."""


@dataclass(frozen=True)
class Part:
    """A tower with what PEFT has put on it.

    :param prefix: what its names in lavintk begin with; the rest is transformers' name.
    :param targets: PEFT's ``target_modules`` in the whole tower.
    :param model: the ``PeftModel``.
    """

    prefix: str
    targets: list[str]
    model: Any

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains, by names that do not repeat PEFT's own wrappers."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own = name.removeprefix("base_model.").removeprefix("model.").replace(f".{NAME}", "")
                yield self.prefix + own, parameter


class PeftAdapter:
    """A method of PEFT on the layers that ``options.targets`` selects.

    :raises OptionsError: PEFT refuses the settings.
    """

    conditions: tuple[str, ...] = ("all",)

    def __init__(self, options: PeftOptions) -> None:
        self.options = options
        self.inexact_gradient = DORA_GRADIENT if options.method == "dora" else ""
        self.parts: list[Part] = []
        self.layers: dict[str, nn.Module] = {}
        """PEFT's layers by the name of the layer they wrap; empty until :meth:`attach`."""
        self._frozen: dict[str, FrozenLinear] = {}
        # what PEFT refuses is to be known before a model is loaded
        _make_config(options, list(options.given().get("feedforward_modules") or ["q_proj"]))

    def attach(self, model: MultimodalModel) -> None:
        """Wrap the selected linear layers in place.

        :raises ModelError: a target fits no layer, or the method cannot work on one; the message says what is known.
        """
        linears = model.linears()
        selected = select_linears(self.options.targets, linears, "peft")
        for prefix in (LANGUAGE, VISION):
            names = [name for name in selected if name.startswith(prefix)]
            if names:
                short = {name.removeprefix(prefix): linears[name] for name in names}
                targets = peft_targets(names, linears) if prefix == LANGUAGE else list(short)
                self.parts.append(Part(prefix, targets, _wrapped(short, self.options, targets)))
        for part in self.parts:
            for name in (name for name in selected if name.startswith(part.prefix)):
                layer = part.model.base_model.model.get_submodule(name.removeprefix(part.prefix))
                self.layers[name], self._frozen[name] = layer, linears[name]
                model.replace(name, layer.train(linears[name].training))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what the method trains, by the layer's name and PEFT's own, as ``<linear>.lora_A.weight``."""
        for part in self.parts:
            yield from part.trainable()

    def side_tokens(self) -> None:
        """Return None: PEFT's layers add no tokens."""

    def save(self, folder: Path, base: str) -> None:
        """Write PEFT's two files; those of the vision tower go to the folder ``vision`` within."""
        for part in self.parts:
            language = part.prefix == LANGUAGE
            task, origin = (CAUSAL_LM, base) if language else (None, None)
            save_part(part.model, _folder_of(part, folder), targets=part.targets, task=task, base=origin)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` or PEFT wrote. Nothing is changed unless all of it fits.

        :raises CheckpointError: unreadable files, settings that give another function, and missing, unexpected or
            misshapen tensors, all of them listed.
        """
        faults: list[str] = []
        found = [(part, read_part(part.model, _folder_of(part, folder), faults)) for part in self.parts]
        if faults:
            advice = "Was it trained on another model, or with another method, r, targets or settings of 'peft'?"
            raise CheckpointError(f"PEFT adapter {folder}", faults, advice)
        for part, tensors in found:
            fill_part(part.model, tensors)

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        """Yield what each layer adds; the same under every condition.

        LoRA, rsLoRA, VeRA and LoHa give their low-rank factors. All other methods change the whole matrix: their
        update is the difference of the weights, exact and of full rank, to be merged rather than kept beside the base.
        """
        for name, layer in self.layers.items():
            if name.startswith(prefix):
                yield _update(name, layer, self._frozen[name], _FACTORS.get(self.options.method, _no_factors))


def _make_config(options: PeftOptions, targets: Sequence[str]) -> Any:
    """Return PEFT's configuration.

    :raises OptionsError: PEFT has no such method, or refuses the settings.
    """
    method, subject = options.chosen, f"adapter 'peft' with method={options.method}"
    make: Callable[..., Any] | None = getattr(peft, method.config, None)
    if make is None:
        raise OptionsError(subject, [f"PEFT {peft.__version__} has no {method.config}"], "Try pip install -U peft.")
    settings = {**method.fixed, **options.given()} | ({} if options.r is None else {"r": options.r})
    if options.method == "ia3":
        settings.setdefault("feedforward_modules", [n for n in targets if n.rpartition(".")[2] in FEEDFORWARD])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Specified to not save")  # of RandLoRA: see methods.py
            return make(target_modules=list(targets), **settings)
    except (TypeError, ValueError) as error:
        raise OptionsError(subject, [f"PEFT says: {error}"]) from error


def _wrapped(linears: Mapping[str, FrozenLinear], options: PeftOptions, targets: Sequence[str]) -> Any:
    """Return PEFT's model of views of ``linears``.

    :raises ModelError: the method cannot work on one of them.
    """
    config = _make_config(options, targets)
    try:
        with _without_a_compiler():
            return peft.get_peft_model(cast(Any, view_of(linears)), config, NAME)
    except (TypeError, ValueError) as error:
        raise ModelError(f"PEFT cannot put method={options.method} on the chosen layers: {error}") from error


@contextmanager
def _without_a_compiler() -> Iterator[None]:
    """Keep BOFT from compiling its CUDA extension.

    Only butterfly factors above 1 gain by it. To look for it PEFT imports setuptools, which fails in a process that has
    imported distutils before.
    """
    from peft.tuners.boft import layer

    untyped: Any = layer
    search, untyped.get_fbd_cuda = untyped.get_fbd_cuda, lambda: None
    try:
        yield
    finally:
        untyped.get_fbd_cuda = search


def _folder_of(part: Part, folder: Path) -> Path:
    return folder if part.prefix == LANGUAGE else folder / VISION_FOLDER


Factors = tuple[Tensor, Tensor]
"""down ``[r, in]`` and up ``[out, r]``."""


@torch.no_grad()
def _update(name: str, layer: Any, base: FrozenLinear, factors: Callable[[Any], Factors | None]) -> AffineUpdate:
    """Return what ``layer`` adds to ``base``; dropout is off."""
    training = layer.training
    layer.eval()
    try:
        down, up = factors(layer) or _difference(layer, base)
        bias = None if base.bias is None else _at_zero(layer, base) - base.bias.float()
    finally:
        layer.train(training)
    bias = bias if bias is not None and bias.any() else None
    return AffineUpdate(name, "all", down.detach().float(), up.detach().float(), bias)


def _at_zero(layer: nn.Module, base: FrozenLinear) -> Tensor:
    device = next(base.buffers()).device
    return cast(Tensor, layer(torch.zeros(1, base.in_features, device=device))[0])


def _difference(layer: nn.Module, base: FrozenLinear) -> Factors:
    """Return the difference of the weights as a product with the smaller identity.

    The layer's weight is what it makes of the identity, whatever the method computes.
    """
    weight = base.dequantize()
    identity = torch.eye(base.in_features, device=weight.device)
    changed = layer(identity)
    if base.bias is not None:
        changed = changed - _at_zero(layer, base)
    difference = changed.T - weight
    if base.in_features <= base.out_features:
        return identity, difference
    return difference, torch.eye(base.out_features, device=weight.device)


def _no_factors(layer: Any) -> None:
    return None


def _lora(layer: Any) -> Factors:
    return layer.lora_A[NAME].weight, layer.scaling[NAME] * layer.lora_B[NAME].weight


def _vera(layer: Any) -> Factors:
    down = layer.vera_A[NAME][:, : layer.in_features]
    up = layer.vera_B[NAME][: layer.out_features]
    return layer.vera_lambda_d[NAME][:, None] * down, layer.vera_lambda_b[NAME][:, None] * up


def _loha(layer: Any) -> Factors | None:
    """Return ``(A1 B1) * (A2 B2)``, elementwise, as one product of rank r * r, unless that is no saving.

    Column (i, j) of its up factor is the product of column i of A1 and column j of A2, likewise the rows of down.
    """
    first_up, second_up = layer.hada_w1_a[NAME], layer.hada_w2_a[NAME]
    first_down, second_down = layer.hada_w1_b[NAME], layer.hada_w2_b[NAME]
    rank, features = first_up.shape[1] * second_up.shape[1], min(first_up.shape[0], first_down.shape[1])
    if rank >= features:
        return None
    up = torch.einsum("oi,oj->oij", first_up, second_up).flatten(1)
    down = torch.einsum("in,jn->ijn", first_down, second_down).flatten(0, 1)
    return down, layer.scaling[NAME] * up


_FACTORS: Mapping[str, Callable[[Any], Factors | None]] = {
    "lora": _lora,
    "rslora": _lora,
    "vera": _vera,
    "loha": _loha,
}
"""How the low-rank methods say their factors."""
