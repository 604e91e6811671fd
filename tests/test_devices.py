"""Torch's allocator is settled before a CUDA device is used, unless the user did."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from lavintk.devices import ALLOCATOR_CALLS, ALLOCATOR_SETTINGS, pick_device


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
