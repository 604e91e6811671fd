"""Which of the fused kernels are used, and whether Triton runs on a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lavintk.errors import LavintkError, did_you_mean

NAMES = ("dequantize", "low_rank", "rms_norm", "rope", "swiglu")
"""The kernels that :data:`VARIABLE` can name; ``dequantize`` stands for those of all quantizers."""
VARIABLE = "LAVINTK_KERNELS"
"""Environment variable: ``all`` (the default), ``none``, or names of kernels, separated by commas."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Number types that the kernels are written for."""

_override: frozenset[str] | None = None


def parse(text: str) -> frozenset[str]:
    """Return the kernels that ``text`` names: ``all``, ``none``, or names separated by commas; all if it is empty.

    :raises LavintkError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["all"]):
        return frozenset(NAMES)
    if names == ["none"]:
        return frozenset()
    for name in names:
        if name not in NAMES:
            raise LavintkError(
                f"{VARIABLE}={text}: no kernel named {name!r}. Say all, none, or some of {', '.join(NAMES)}, "
                f"separated by commas.{did_you_mean(name, NAMES)}"
            )
    return frozenset(names)


def check_environment() -> None:
    """Check what the environment asks for, also where no kernel will be wanted.

    :raises LavintkError: it names an unknown kernel.
    """
    parse(os.environ.get(VARIABLE, ""))


@cache
def _from_environment() -> frozenset[str]:
    """Return what the environment asks for, read when a kernel is first wanted and never again."""
    return parse(os.environ.get(VARIABLE, ""))


def enabled(name: str) -> bool:
    """Whether the kernel ``name`` is switched on, by :func:`using` or else by the environment.

    :raises LavintkError: the environment names an unknown kernel.
    """
    return name in (_from_environment() if _override is None else _override)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Use the kernels that ``choice`` names, written as in the environment, for tests and benchmarks.

    :raises LavintkError: a name is unknown.
    """
    global _override
    before, _override = _override, parse(choice)
    try:
        yield
    finally:
        _override = before


@cache
def problem(device: torch.device) -> str:
    """Return why Triton kernels cannot run on ``device``, or an empty string; found out once, with a tiny kernel.

    Triton may be there and fail all the same: it wants a C compiler, and not every GPU is one that it knows.
    """
    if device.type != "cuda":
        return f"Triton has no kernels for the device {device}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from lavintk.kernels import triton_swiglu

        one = torch.ones(1, 1, device=device)
        triton_swiglu.swiglu(one, one)
    except Exception as error:  # whatever it is, torch's operations do the same work
        return f"Triton fails on {device}: {type(error).__name__}: {str(error).strip() or 'no message'}"
    return ""


def fused(name: str, *tensors: Tensor) -> bool:
    """Whether the kernel ``name`` takes ``tensors``: it is switched on, and they share a fit device and number type.

    Under ``torch.compile`` it does not: the compiler fuses torch's operations with their neighbours.

    :raises LavintkError: the environment names an unknown kernel.
    """
    first = tensors[0]
    return (
        first.is_cuda
        and not torch.compiler.is_compiling()
        and enabled(name)
        and first.dtype in TYPES
        and all(x.dtype == first.dtype and x.device == first.device and x.numel() > 0 for x in tensors)
        and not problem(first.device)
    )
