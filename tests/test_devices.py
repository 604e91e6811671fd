"""Torch's allocator is settled before a CUDA device is used, unless the user did."""

from __future__ import annotations

import os
import platform
import sys

import pytest
import torch

from lavintk.devices import ALLOCATOR_SETTINGS, pick_device


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ALLOCATOR_SETTINGS})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def settled() -> dict[str, str]:
    return {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
@pytest.mark.usefixtures("unsettled")
def test_a_cuda_device_gets_segments_that_grow(name: str) -> None:
    assert pick_device(name).type == "cuda"
    assert settled() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("variable", ALLOCATOR_SETTINGS)
@pytest.mark.usefixtures("unsettled")
def test_what_the_user_settled_stays(variable: str) -> None:
    os.environ[variable] = "backend:cudaMallocAsync"
    pick_device("cuda")
    assert settled() == {variable: "backend:cudaMallocAsync"}


@pytest.mark.parametrize(
    ("system", "release"), [("win32", "10"), ("linux", "6.18.33.2-microsoft-standard-WSL2"), ("darwin", "24")]
)
@pytest.mark.usefixtures("unsettled")
def test_where_a_driver_may_fail_the_allocator_is_left_as_it_is(
    system: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    pick_device("cuda")
    assert settled() == {}


@pytest.mark.usefixtures("unsettled")
def test_a_cpu_leaves_the_allocator_alone() -> None:
    pick_device("cpu")
    assert settled() == {}


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_has_taken_the_setting_over() -> None:
    pick_device("cuda")
    if os.environ.get("PYTORCH_ALLOC_CONF") != "expandable_segments:True":
        pytest.skip("the allocator was settled by someone else")
    torch.ones(1, device="cuda")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    assert settings["expandable_segments"]
