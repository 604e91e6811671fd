"""Optimizers of bitsandbytes: AdamW, Lion and AdEMAMix, with 8-bit and with paged state.

Two sizes matter. Parameters below 4096 elements keep 32-bit state in an 8-bit optimizer too: their state is
small, and quantizing it would cost accuracy. Only the state of parameters from 100 000 elements on is paged,
that of smaller ones stays resident.

Without CUDA there is nothing to page to: the same optimizer is built with resident state. (Asked for paged
state on a CPU, bitsandbytes 0.50 warns and does the same for AdamW and Lion, and fails for AdEMAMix.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.optim import adamw, ademamix, lion
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor

from lavintk.errors import TrainingError

PAGED_FROM = 100_000
"""Elements from which on bitsandbytes pages a parameter's state."""

BLOCK = 256
"""Elements that share a scale in 8-bit state."""


class _Optimizer:
    """What the optimizers share: a device to work on, and resident or paged state."""

    elementwise = True

    def __init__(self, state_bits: Literal[8, 32], paged: bool) -> None:
        self.state_bits: int = state_bits
        self.paged = paged
        self.without_cuda = (
            f"without CUDA there is no paging: the {state_bits}-bit optimizer state stays in host memory."
            if paged
            else ""
        )

    def _create(
        self,
        resident: type[torch.optim.Optimizer],
        paged: type[torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]],
        **settings: Any,
    ) -> torch.optim.Optimizer:
        pages = _device_type(groups) == "cuda" and self.paged
        groups = [dict(group) for group in groups]
        settings |= {"optim_bits": self.state_bits, "is_paged": pages}
        return (paged if pages else resident)(groups, **settings)


class AdamW(_Optimizer):
    """AdamW with decoupled weight decay, two state values per parameter."""

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer; see :class:`lavintk.contracts.Optimizer`.

        :raises TrainingError: no parameters, or on a device that bitsandbytes has no kernels for.
        """
        return self._create(adamw.AdamW, PagedAdamW, groups, lr=lr, betas=betas, eps=eps)


class Lion(_Optimizer):
    """Lion (arXiv:2302.06675): steps of the size ``lr`` in each coordinate, one state value per parameter.

    :param betas: Lion's own; those given to :meth:`build` are AdamW's and not used.
    """

    def __init__(self, state_bits: Literal[8, 32], paged: bool, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(state_bits, paged)
        self.betas = betas

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer; see :class:`lavintk.contracts.Optimizer`. ``betas`` and ``eps`` are not used.

        :raises TrainingError: no parameters, or on a device that bitsandbytes has no kernels for.
        """
        return self._create(lion.Lion, PagedLion, groups, lr=lr, betas=self.betas)


class AdEMAMix(_Optimizer):
    """AdEMAMix (arXiv:2409.03137): AdamW plus a slow average of the gradient.

    It keeps three state values per parameter.

    :param beta3: decay of the slow average.
    :param alpha: its weight in the update.
    :param schedule_steps: steps over which both grow to their values, 0 for none.
    """

    def __init__(
        self,
        state_bits: Literal[8, 32],
        paged: bool,
        beta3: float = 0.9999,
        alpha: float = 5.0,
        schedule_steps: int = 0,
    ) -> None:
        super().__init__(state_bits, paged)
        self.beta3, self.alpha, self.schedule_steps = beta3, alpha, schedule_steps

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer; see :class:`lavintk.contracts.Optimizer`.

        :raises TrainingError: no parameters, or on a device that bitsandbytes has no kernels for.
        """
        steps = self.schedule_steps or None
        return self._create(
            WholeBlocksAdEMAMix,
            PagedAdEMAMix,
            groups,
            lr=lr,
            betas=(*betas, self.beta3),
            alpha=self.alpha,
            t_alpha=steps,
            t_beta3=steps,
            eps=eps,
        )


class _PagedState(Optimizer8bit):
    """Saves and loads paged state; bitsandbytes' own loading leaves all of it resident on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ordinary tensors: copies of paged ones would only claim to be paged."""
        saved: dict[str, Any] = super().state_dict()  # type: ignore[no-untyped-call]
        saved["state"] = {key: _ordinary(value) for key, value in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load the state, large parts of it into paged memory and never as a whole onto the device."""
        super().load_state_dict(state_dict, move_to_device=False)  # type: ignore[no-untyped-call]
        for parameter, state in self.state.items():
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if key in ("state1", "state2") and parameter.numel() >= PAGED_FROM:
                    state[key] = self._paged_copy(value, parameter.device)
                else:
                    state[key] = value.to(parameter.device)

    def _paged_copy(self, value: Tensor, device: torch.device) -> Tensor:
        pages: Tensor = bnb_functional.get_paged(  # type: ignore[no-untyped-call]
            *value.shape, dtype=value.dtype, device=device
        )
        pages.copy_(value)
        self.page_mng.paged_tensors.append(pages)
        return pages


class PagedAdamW(_PagedState, adamw.AdamW):
    """bitsandbytes' AdamW whose state stays paged when it is loaded."""


class PagedLion(_PagedState, lion.Lion):
    """bitsandbytes' Lion whose state stays paged when it is loaded."""


class WholeBlocksAdEMAMix(ademamix.AdEMAMix):
    """bitsandbytes' AdEMAMix with 32-bit state for parameters that do not fill whole blocks of 256 elements.

    Its 8-bit CUDA kernel (0.50.2) keeps the scales of both averages in one array and finds those of the slow
    average from ``(elements + offset) / 256``, rounded down. If the elements are no multiple of 256, the last
    block of the fast average and the first of the slow one share a scale: wrong steps, which also differ from
    run to run.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return the parameter's settings, with 32 bits where its blocks are not whole."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[no-untyped-call]
        if group["params"][pindex].numel() % BLOCK:
            config["optim_bits"] = 32
        return config


class PagedAdEMAMix(_PagedState, WholeBlocksAdEMAMix):
    """bitsandbytes' AdEMAMix whose state stays paged when it is loaded."""


def _ordinary(value: Any) -> Any:
    """Return ``value`` with its tensors, also in nested dictionaries, without the marks of paged memory."""
    if isinstance(value, dict):
        return {key: _ordinary(item) for key, item in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


def _device_type(groups: Sequence[dict[str, Any]]) -> str:
    """Return ``"cpu"`` or ``"cuda"``, where all parameters must be.

    :raises TrainingError: anything else.
    """
    devices: set[str] = {parameter.device.type for group in groups for parameter in group["params"]}
    if not devices:
        raise TrainingError("there are no parameters to train: does the recipe name an adapter?")
    if len(devices) > 1:
        raise TrainingError(f"the trained parameters lie on {' and '.join(sorted(devices))}: move them to one device")
    (device,) = devices
    if device not in ("cpu", "cuda"):
        raise TrainingError(f"bitsandbytes' optimizers run on a CPU or with CUDA, not on {device}: use --optim adamw")
    return device
