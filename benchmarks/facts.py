"""What a benchmark ran on: device, driver and versions, found out without touching the device."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def importable(module: str) -> bool:
    """Whether a module is installed."""
    return importlib.util.find_spec(module) is not None


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return device, driver, Python and the versions of those ``packages`` that are installed.

    Creates no CUDA context, which would take memory from what is measured.
    """
    import torch

    versions = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
    if not torch.cuda.is_available():
        device, driver = f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", ""
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        name, memory, driver = [*_nvidia_smi("name,memory.total,driver_version", visible), "", "", ""][:3]
        device = f"{name or torch.cuda.get_device_name()}{f', {int(memory) / 1024:.0f} GiB' if memory else ''}"
        driver = f"driver {driver or _driver_of_kernel()}, CUDA {torch.version.cuda}"
    return {"device": device, "driver": driver, "versions": {k: v for k, v in versions.items() if v}}


def in_words(facts: dict[str, Any]) -> list[str]:
    """Return an environment as two lines: the device with its driver, and the versions."""
    device = ", ".join(filter(None, [facts["device"], facts["driver"]]))
    return [device, ", ".join(f"{name} {number}" for name, number in facts["versions"].items())]


def memory_in_use() -> float:
    """Return GiB of the first visible GPU that are in use by anyone; 0 without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    used = _nvidia_smi("memory.used", visible)
    return int(used[0]) / 1024 if used and used[0].isdigit() else 0.0


def _nvidia_smi(query: str, device: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", device]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [field.strip() for field in output.splitlines()[0].split(",")] if output.strip() else []


def _driver_of_kernel() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3}\.\d[\d.]*", path.read_text()) if path.exists() else None
    return found.group() if found else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
