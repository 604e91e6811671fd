"""What is computed in; torch's allocator is settled before a CUDA device is used, unless the user did."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavintk.devices import ALLOCATOR_CALLS, ALLOCATOR_SETTINGS, cpu_multiplies_bf16, pick_device, pick_precision


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator is told, on a Linux machine that seems to have a CUDA device."""
    told: list[str] = []
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    return told


@pytest.mark.parametrize(("avx512_bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_training_on_a_cpu_is_in_bf16_where_the_cpu_multiplies_it(
    avx512_bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu, training=True) == (torch.bfloat16 if avx512_bf16 or amx else torch.float32)
    assert pick_precision("auto", cpu) == torch.float32  # what is compared with exports
    assert pick_precision("fp32", cpu, training=True) == torch.float32


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells what the processor has")
def test_what_torch_says_of_the_cpu_is_what_the_system_says() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert cpu_multiplies_bf16() == bool(flags & {"avx512_bf16", "amx_tile"})


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_cuda_device_gets_segments_that_grow(name: str, settled: list[str]) -> None:
    assert pick_device(name).type == "cuda"
    assert settled == ["expandable_segments:True"]


@pytest.mark.parametrize("variable", ALLOCATOR_SETTINGS)
def test_what_the_user_settled_stays(variable: str, settled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "backend:cudaMallocAsync")
    pick_device("cuda")
    assert not settled


@pytest.mark.parametrize(
    ("system", "release"), [("win32", "10"), ("linux", "6.18.33.2-microsoft-standard-WSL2"), ("darwin", "24")]
)
def test_where_a_driver_may_fail_the_allocator_is_left_as_it_is(
    system: str, release: str, settled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    pick_device("cuda")
    assert not settled


def test_a_torch_that_cannot_be_told_is_left_alone(settled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_CALLS:
        monkeypatch.delattr(torch._C, name, raising=False)
    assert pick_device("cuda").type == "cuda"


def test_a_cpu_leaves_the_allocator_alone(settled: list[str]) -> None:
    pick_device("cpu")
    assert not settled


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_takes_the_setting_over() -> None:
    code = (
        "import torch; from lavintk.devices import pick_device; pick_device('cuda'); torch.ones(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-1] == "True", done.stderr
