"""Looks over the installation: what is there, what is wrong, and what to do about it.

Each check yields findings; :func:`examine` runs them all and never raises. A *fault* is something that will
break a command; *advice* is about something that works, but not as well as it could.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from lavintk import plugin_api
from lavintk.cache import cache_folder
from lavintk.errors import PluginError, did_you_mean
from lavintk.plugins import (
    BUILTIN_ONLY,
    CORE,
    PluginRecord,
    disabled_names,
    found_points,
    installed_names,
    load_plugins,
    only_builtin,
)

SLOW_SECONDS = 0.5
"""A plugin that takes longer to import delays every command."""
HEAVY = ("bitsandbytes", "numpy", "onnxruntime", "pandas", "PIL", "pydantic", "torch", "transformers")
"""Packages that a plugin should not import before something it offers is used."""
LOAD_TIMEOUT = 60
"""Seconds that importing all plugins may take."""
LITTLE_DISK = 5 * 2**30
"""Free bytes below which a model download may not fit."""
NF4_ERROR = 0.12
"""Mean error that NF4 may make on normal values, relative to their spread (0.07 is usual)."""
BITSANDBYTES_ADVICE = "python -m bitsandbytes tells more; pip install --upgrade bitsandbytes often helps"

Status = Literal["ok", "advice", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    :param area: what was looked at, for example ``"torch"``.
    :param text: what was found.
    :param advice: what to do; empty where nothing is to be done.
    :param facts: the same as values, for ``--json``.
    """

    area: str
    status: Status
    text: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine(announce: Callable[[str], object] = lambda area: None) -> list[Finding]:
    """Return the findings of all checks; takes some seconds, since torch is imported.

    :param announce: called with each area before it is looked at.
    """
    findings: list[Finding] = []
    for area, check in CHECKS.items():
        announce(area)
        try:
            findings.extend(check())
        except Exception as error:  # a doctor must not die of what ails the patient
            text = f"the check itself failed: {type(error).__name__}: {error}"
            advice = "reinstall what the message names; if it stays, report it with `lavintk doctor --json`"
            findings.append(Finding(area, "fault", text, advice))
    return findings


def check_machine() -> Iterator[Finding]:
    """Say which Python and how much of a machine there is."""
    import psutil

    memory = psutil.virtual_memory()
    facts = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
    }
    text = (
        f"Python {facts['python']}, {platform.system()} {platform.machine()}, {facts['cores']} cores, "
        f"{_size(memory.available)} of {_size(memory.total)} memory free"
    )
    yield Finding("machine", "ok", text, facts=facts)


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with what lavintk requires."""
    try:
        declared = requires("lavintk") or []
    except PackageNotFoundError:
        text = "lavintk is on the path but not installed, so its plugins are not found"
        yield Finding("packages", "fault", text, "pip install -e . in the folder of its pyproject.toml")
        return
    from packaging.requirements import Requirement  # what lavintk requires brings it along

    wanted = [Requirement(text) for text in declared]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    unmet = [text for text in map(_unmet, wanted) if text]
    if unmet:
        yield Finding("packages", "fault", "; ".join(unmet), "pip install --upgrade lavintk")
    else:
        yield Finding("packages", "ok", f"all {len(wanted)} required ones are there, in fitting versions")


def check_torch() -> Iterator[Finding]:
    """Say what torch can compute with, and try it."""
    try:
        import torch
    except Exception as error:  # a library that does not load raises OSError, a mixed-up one anything
        yield _not_importable("torch", error)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    facts: dict[str, Any] = {"version": torch.__version__, "cuda_build": torch.version.cuda, "devices": []}
    if not torch.cuda.is_available():
        yield _torch_without_cuda(f"{torch.__version__} ({build}), {torch.get_num_threads()} threads", facts)
        return
    facts["devices"] = [_device_facts(index) for index in range(torch.cuda.device_count())]
    yield Finding("torch", "ok", f"{torch.__version__} ({build})", facts=facts)
    for index, device in enumerate(facts["devices"]):
        yield _try_device(index, device)


def check_bitsandbytes() -> Iterator[Finding]:
    """Say which native library bitsandbytes loaded, and quantize something with it."""
    try:
        import bitsandbytes
        import torch
        from bitsandbytes.cextension import lib
    except Exception as error:  # bitsandbytes raises many kinds when its library does not fit
        yield _not_importable("bitsandbytes", error)
        return
    path = getattr(vars(lib).get("_lib"), "_name", None)  # absent where no library could be loaded
    on_cuda = bool(vars(type(lib)).get("compiled_with_cuda", False))
    facts = {"version": bitsandbytes.__version__, "native_library": path, "cuda": on_cuda}
    text = f"{bitsandbytes.__version__}, native library {Path(path).name if path else 'not loaded'}"
    cuda = torch.cuda.is_available()
    if path is None or (cuda and not on_cuda):
        text += f", which does not fit torch {torch.__version__}"
        yield Finding("bitsandbytes", "fault", text, BITSANDBYTES_ADVICE, facts)
    else:
        yield Finding("bitsandbytes", "ok", text, facts=facts)
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        yield _try_quantization(device)


def check_transformers() -> Iterator[Finding]:
    """See whether transformers is there and accepts this torch."""
    try:
        import transformers
        from transformers.utils.import_utils import is_torch_available
    except Exception as error:  # a mismatch among its dependencies raises many kinds
        yield _not_importable("transformers", error)
        return
    facts = {"version": transformers.__version__, "torch": bool(is_torch_available())}
    if facts["torch"]:
        yield Finding("transformers", "ok", transformers.__version__, facts=facts)
    else:
        text = f"{transformers.__version__} refuses the installed torch {_version('torch')}"
        yield Finding("transformers", "fault", text, "pip install --upgrade torch", facts)


def check_onnxruntime() -> Iterator[Finding]:
    """Say which ONNX Runtime is there; two at once overwrite each other's files."""
    names = ("onnxruntime", "onnxruntime-gpu")
    installed = {name: number for name in names if (number := _version(name)) is not None}
    listed = " and ".join(f"{name} {number}" for name, number in installed.items())
    facts: dict[str, Any] = {"installed": installed}
    if not installed:
        advice = "to check an export, pip install 'lavintk[cpu]', or 'lavintk[gpu]' for CUDA"
        yield Finding("onnxruntime", "ok", "not installed, and training does without", advice, facts)
        return
    if len(installed) > 1:
        text = f"{listed} are both installed and overwrite each other's files"
        advice = "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'lavintk[cpu]' or 'lavintk[gpu]'"
        yield Finding("onnxruntime", "fault", text, advice, facts)
        return
    try:
        import onnxruntime
    except Exception as error:  # its library may not load
        yield _not_importable(next(iter(installed)), error)
        return
    facts["providers"] = onnxruntime.get_available_providers()
    text = f"{listed}, providers {', '.join(p.removesuffix('ExecutionProvider') for p in facts['providers'])}"
    if "onnxruntime-gpu" in installed and "CUDAExecutionProvider" not in facts["providers"]:
        advice = "onnxruntime-gpu needs an NVIDIA driver and CUDA libraries that it can load"
        yield Finding("onnxruntime", "advice", text, advice, facts)
    else:
        yield Finding("onnxruntime", "ok", text, facts=facts)


def check_hub() -> Iterator[Finding]:
    """Ask the Hugging Face hub for an answer; waits 3 seconds at most."""
    from lavintk.models.download import hub_endpoint, hub_offline, probe

    address = hub_endpoint()
    if hub_offline():
        text, advice = "not asked, since HF_HUB_OFFLINE is set", "unset it to fetch models"
        yield Finding("hub", "advice", text, advice, {"address": address, "reachable": None})
        return
    status = probe(address)
    facts = {"address": address, "reachable": status is not None, "http_status": status}
    if status is not None and status < 500:
        yield Finding("hub", "ok", f"{address} answers", facts=facts)
        return
    text = f"{address} does not answer" if status is None else f"{address} answers with HTTP {status}"
    advice = (
        "the demo's model comes from the package index then; other models go by folder or .gguf file "
        "(HF_ENDPOINT names a mirror)"
    )
    yield Finding("hub", "advice", text, advice, facts)


def check_cache() -> Iterator[Finding]:
    """Say what the cache holds and how much room there is."""
    folder = cache_folder()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(existing).free
    facts = {"folder": str(folder), "used_bytes": used, "free_bytes": free}
    text = f"{folder} holds {_size(used)}; {_size(free)} free on that disk"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        text, advice = f"{folder} cannot be written", "set LAVINTK_CACHE to a folder that may be written"
        yield Finding("cache", "fault", text, advice, facts)
    elif free < LITTLE_DISK:
        advice = "make room, or set LAVINTK_CACHE to a folder on another disk"
        yield Finding("cache", "advice", text, advice, facts)
    else:
        yield Finding("cache", "ok", text, facts=facts)


def check_plugins() -> Iterator[Finding]:
    """Import each plugin in a process of its own and time it, then let all of them register together."""
    disabled = disabled_names()
    yield from _about_disabled(disabled)
    try:
        builtin_only = only_builtin()
    except PluginError as error:
        yield Finding("plugins", "fault", str(error), f"unset LAVINTK_PLUGINS, or set it to {BUILTIN_ONLY}")
        return
    used = _load_plugins_apart()
    broken = frozenset(name for name, load in used.items() if load.error)
    try:
        plugins = load_plugins(disabled | broken, builtin_only=builtin_only)
    except PluginError as error:
        yield from _plugin_troubles(used, {})
        text, _, advice = str(error).partition("\n")
        yield Finding("plugins", "fault", text, advice or "uninstall or disable one of them (LAVINTK_DISABLE)")
        return
    troubles = list(_plugin_troubles(used, plugins.left_out))
    yield from troubles
    records = plugins.records()
    named = {finding.facts["name"] for finding in troubles}
    yield from filter(None, (_about_version(record) for record in records if record.name not in named))
    offered = sum(len(names) for record in records for names in record.offers.values())
    times = {name: load.seconds for name, load in used.items() if not load.error}
    shown = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times.items()) or "nothing"
    text = f"{offered} names on offer; loaded beside the core: {shown}"
    if builtin_only:
        text += "; others are left out by LAVINTK_PLUGINS=builtin"
    yield Finding("plugins", "ok", text, facts={"offered": offered, "seconds": times})


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "machine": check_machine,
    "packages": check_packages,
    "torch": check_torch,
    "bitsandbytes": check_bitsandbytes,
    "transformers": check_transformers,
    "onnxruntime": check_onnxruntime,
    "hub": check_hub,
    "cache": check_cache,
    "plugins": check_plugins,
}
"""Area to the check that looks at it, in the order of the report."""


@dataclass(frozen=True)
class PluginLoad:
    """How importing one plugin went.

    :param seconds: how long it took.
    :param error: what kept it from being imported; empty if nothing.
    :param left_out: why it is left out, where it wants another version of the interface and cannot be imported.
    :param heavy: packages of :data:`HEAVY` that it was the first to import.
    """

    seconds: float
    error: str
    left_out: str
    heavy: tuple[str, ...]


def print_loads() -> None:
    """Import every plugin that is not left out and print how each went as JSON; for a process of its own."""
    loads: dict[str, tuple[float, str, str, list[str]]] = {}
    for name, (point, *_) in found_points(disabled_names(), builtin_only=only_builtin()).items():
        before = {package for package in HEAVY if package in sys.modules}
        error, left_out, started = "", "", time.perf_counter()
        try:
            point.load()
        except BaseException as failure:  # also a plugin that calls sys.exit
            error = f"{type(failure).__name__}: {failure}"
            left_out = plugin_api.why_left_out(point, plugin_api.declared_in_source(point.module))
        seconds = round(time.perf_counter() - started, 4)
        heavy = [package for package in HEAVY if package in sys.modules and package not in before]
        loads[name] = seconds, error, left_out, heavy
    print(f"\n{json.dumps(loads)}")


def _load_plugins_apart() -> dict[str, PluginLoad]:
    """Return how importing each plugin goes in a fresh interpreter, in which nothing is imported yet."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", "from lavintk.doctor import print_loads as run; run()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LOAD_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"importing the plugins ended Python: {done.stderr.strip()[-300:]}")
    loads = json.loads(done.stdout.splitlines()[-1])
    return {
        name: PluginLoad(seconds, error, left_out, tuple(heavy))
        for name, (seconds, error, left_out, heavy) in loads.items()
    }


def _about_disabled(disabled: frozenset[str]) -> Iterator[Finding]:
    installed = installed_names()
    for name in sorted(disabled):
        facts = {"name": name, "disabled": True}
        if name in installed:
            yield Finding("plugins", "ok", f"{name} is left out by LAVINTK_DISABLE", facts=facts)
        else:
            text = f"LAVINTK_DISABLE={name} names no plugin.{did_you_mean(name, installed)}"
            yield Finding("plugins", "advice", text, "lavintk plugins list shows plugins and what they offer")


def _plugin_troubles(loads: Mapping[str, PluginLoad], left_out: Mapping[str, str]) -> Iterator[Finding]:
    """Say which plugins cannot be used, and which ones hold every command up.

    :param left_out: why plugins that can be imported are left out, by name.
    """
    for name, load in loads.items():
        facts = {"name": name, "seconds": load.seconds, "error": load.error, "heavy": load.heavy}
        if reason := left_out.get(name, load.left_out):
            text, _, advice = reason.partition("\n")
            yield Finding("plugins", "fault", text, advice, facts)
        elif load.error:
            advice = f"install what is missing, or skip it with LAVINTK_DISABLE={name}"
            yield Finding("plugins", "fault", f"{name} failed to load: {load.error}", advice, facts)
        elif load.seconds > SLOW_SECONDS or load.heavy:
            what = f", and imports {', '.join(load.heavy)}" if load.heavy else ""
            advice = (
                "every command waits for it: heavy imports and other work belong inside its factories "
                f"(LAVINTK_DISABLE={name} skips it)"
            )
            yield Finding("plugins", "advice", f"{name} takes {load.seconds:.1f} s to load{what}", advice, facts)


def _about_version(record: PluginRecord) -> Finding | None:
    """Say that a plugin should declare another version of the interface, or None where there is nothing to say."""
    current = plugin_api.SUPPORTED[-1]
    if record.name == CORE or record.api == current:
        return None
    if record.api is None:
        text = f"{record.name} names no version of the plugin interface; {plugin_api.ASSUMED} is taken"
    else:
        text = f"{record.name} wants version {record.api} of the plugin interface, which still works, but is going"
    advice = f"its author should write lavintk_api = {current} into it, see docs/plugins"
    return Finding("plugins", "advice", text, advice, {"name": record.name, "api": record.api})


def _torch_without_cuda(text: str, facts: dict[str, Any]) -> Finding:
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if driver and facts["cuda_build"] is None:
        advice = "there is an NVIDIA driver: install a CUDA build of torch to use the GPU (pytorch.org)"
        return Finding("torch", "advice", text, advice, facts)
    if driver:
        text = f"{text}; an NVIDIA driver is there, but torch sees no GPU"
        advice = "nvidia-smi says whether the driver works; CUDA_VISIBLE_DEVICES may hide the GPU"
        return Finding("torch", "advice", text, advice, facts)
    return Finding("torch", "ok", f"{text}; no GPU, so training runs on the CPU", facts=facts)


def _device_facts(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": total,
        "memory_free_bytes": free,
        "bf16": bf16,
    }


def _try_device(index: int, facts: Mapping[str, Any]) -> Finding:
    """Compute something small: a driver or a build that does not fit the GPU shows only then."""
    import torch

    text = (
        f"cuda:{index} {facts['name']}, compute capability {facts['compute_capability']}, "
        f"{_size(facts['memory_free_bytes'])} of {_size(facts['memory_bytes'])} free, "
        f"{'bf16' if facts['bf16'] else 'no bf16, so fp16 is used'}"
    )
    try:
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        text = f"{text}: it cannot compute: {_first_line(error)}"
        advice = "install a torch build for this GPU and driver (pytorch.org), or use --device cpu"
        return Finding("torch", "fault", text, advice, facts)
    if total != 16**3:
        return Finding("torch", "fault", f"{text}: it computes wrongly", "check it with nvidia-smi", facts)
    return Finding("torch", "ok", text, facts=facts)


def _try_quantization(device: str) -> Finding:
    """Quantize normal values to NF4 and back; the mean error tells whether the kernels work."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    name = "CUDA" if device == "cuda" else "the CPU"
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        error = float((dequantize_4bit(codes, state) - weight).abs().mean())
    except Exception as failure:  # whatever the native library meets
        text = f"NF4 on {name} fails: {_first_line(failure)}"
        return Finding("bitsandbytes", "fault", text, BITSANDBYTES_ADVICE, {"device": device})
    facts = {"device": device, "mean_error": error}
    text = f"NF4 there and back on {name}: mean error {error:.3f}"
    if not math.isfinite(error) or error > NF4_ERROR:
        text = f"{text}, should be below {NF4_ERROR}"
        return Finding("bitsandbytes", "fault", text, BITSANDBYTES_ADVICE, facts)
    return Finding("bitsandbytes", "ok", text, facts=facts)


def _not_importable(distribution: str, error: Exception) -> Finding:
    area, advice = distribution.removesuffix("-gpu"), f"pip install --force-reinstall {distribution}"
    text = f"cannot be imported: {type(error).__name__}: {_first_line(error)}"
    return Finding(area, "fault", text, advice)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unmet(wanted: Any) -> str:
    """Return in words what is wrong with a requirement, or an empty string."""
    found = _version(wanted.name)
    if found is None:
        return f"{wanted.name} is missing"
    fits = wanted.specifier.contains(found, prereleases=True)
    return "" if fits else f"{wanted} is required, found {found}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _size(count: float) -> str:
    for unit, bytes_per_unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_per_unit:
            return f"{count / bytes_per_unit:.1f} {unit}"
    return f"{count:.0f} bytes"
