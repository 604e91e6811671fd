"""Which device and number type to compute with, and how much memory was used."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

from lavintk.errors import OutOfMemoryError, RecipeError

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables by which a user settles torch's allocator; the second is the first one's old name."""
ALLOCATOR_CALLS = ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings")
"""What torch calls the function that settles it, newer name first."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    :raises RecipeError: CUDA is asked for and not there, or the name is unknown.
    """
    device = _named_device(name)
    if device.type == "cuda":
        grow_segments()
    return device


def grow_segments() -> None:
    """Let torch's allocator enlarge what it has of a CUDA device instead of adding pieces that nothing fits into later.

    Training at 13B holds 0.5 GiB less of the device so. Has to come before the device's first use, and does nothing
    where the user settled the allocator, or where the driver cannot be trusted with it.
    """
    # on Windows torch has no such segments; below WSL drivers older than R615 fail in them (pytorch issue 192330)
    trusted = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if trusted and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        # torch reads those variables when it is imported, and has no public way to tell it later
        settle = next((getattr(torch._C, name) for name in ALLOCATOR_CALLS if hasattr(torch._C, name)), None)
        if settle is not None:
            settle("expandable_segments:True")


def _named_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError("train.device", [f"{name!r} is not a device; use auto, cpu, cuda or cuda:N"]) from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError("train.device", [f"{name!r} is not supported; use auto, cpu, cuda or cuda:N"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "train.device", [f"{name!r} was asked for, but torch {torch.__version__} sees no CUDA device"],
            "`lavintk doctor` says why; with --device cpu it works without, slowly.",
        )  # fmt: skip
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise RecipeError("train.device", [f"{name!r} was asked for; there are cuda:0 to cuda:{last}"])
    return device


def pick_precision(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """Return the compute type; ``auto`` is bf16 on CUDA where the GPU has it, else fp16; fp32 on a CPU.

    :param training: ``auto`` is bf16 on CPUs that multiply it by themselves. What a model is compared with or asked
        later stays in fp32 there.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cpu":
        return torch.bfloat16 if training and cpu_multiplies_bf16() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 matrices: with them training takes half the time.

    Those are AVX512-BF16 and AMX of x86. Without them torch takes bf16 too, but is slower than in fp32.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return native and torch.backends.mkldnn.is_available()


def peak_memory(device: torch.device) -> int:
    """Return the peak so far in bytes: allocated on a CUDA device, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


@contextmanager
def enough_memory(device: torch.device, doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turn torch's fault on a full device into one that says what was done, what was used and what to lower.

    :param doing: for example ``"in step 3"``.
    :param advice: called only then.
    :raises OutOfMemoryError: the device's memory did not suffice.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        raise OutOfMemoryError(
            f"{describe(device)} ran out of memory {doing}: {peak_memory(device) / 2**30:.2f} GiB allocated at peak "
            f"of {total:.1f} GiB{_lacking(str(error))}. {advice()}"
        ) from error


def _lacking(message: str) -> str:
    """Return what a fault says of how much was asked for and how much was free, or an empty text."""
    if "host memory" in message:  # which was to be pinned, see lavintk.models.host_memory
        return f"; {message}"
    asked = re.search(r"Tried to allocate (\d[\d.]* [KMG]iB|\d+ bytes)", message)
    free = re.search(r"of which (\d[\d.]* [KMG]iB|\d+ bytes) is free", message)
    if asked is None:
        return ""
    return f"; {asked[1]} more were asked for" + ("" if free is None else f", {free[1]} were free")


def describe(device: torch.device) -> str:
    """Return the device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads"
