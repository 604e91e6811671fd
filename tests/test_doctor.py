import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lavintk import doctor
from lavintk.doctor import Finding
from lavintk.testing import Outcome

RunCli = Callable[..., Outcome]
Install = Callable[..., Path]


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for the network, so that no test waits for it."""
    monkeypatch.setattr("lavintk.models.download.probe", lambda address: None)


# The page


def test_the_report_has_every_area_and_ends_with_0_where_nothing_is_broken(run_cli: RunCli, offline: None) -> None:
    outcome = run_cli("doctor", "--json")
    report = json.loads(outcome.stdout)
    faults = [finding for finding in report["findings"] if finding["status"] == "fault"]
    assert (outcome.exit_code, report["ok"], faults) == (0, True, [])
    assert list(dict.fromkeys(finding["area"] for finding in report["findings"])) == list(doctor.CHECKS)


def test_a_fault_ends_with_1_and_shows_its_advice(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Iterator[Finding]:
        yield Finding("leg", "ok", "left")
        yield Finding("leg", "fault", "right: broken [badly]", "stay in bed")

    monkeypatch.setattr(doctor, "CHECKS", {"leg": check})
    outcome = run_cli("doctor")
    assert outcome.exit_code == 1
    assert [line.split() for line in outcome.stdout.splitlines()[2:5]] == [
        ["leg", "ok", "left"],
        ["fault", "right:", "broken", "[badly]"],
        ["stay", "in", "bed"],
    ]
    assert outcome.stdout.endswith("1 fault to mend.\n")
    assert json.loads(run_cli("doctor", "--json").stdout)["ok"] is False


def test_advice_alone_ends_with_0(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("leg", "advice", "short", "stand on a box")
    monkeypatch.setattr(doctor, "CHECKS", {"leg": lambda: iter([finding])})
    outcome = run_cli("doctor")
    assert outcome.exit_code == 0
    assert "Everything works; 1 thing to consider." in outcome.stdout


def test_a_check_that_fails_itself_is_a_fault_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Finding]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "CHECKS", {"a": fail, "b": lambda: iter([Finding("b", "ok", "fine")])})
    first, second = doctor.examine()
    assert (first.area, first.status) == ("a", "fault")
    assert "ZeroDivisionError: oh" in first.text
    assert second.text == "fine"


# Packages


def test_two_onnxruntimes_at_once_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1.24.0")
    finding = only(doctor.check_onnxruntime())
    assert finding.status == "fault"
    assert "onnxruntime 1.24.0 and onnxruntime-gpu 1.24.0" in finding.text
    assert "pip uninstall onnxruntime onnxruntime-gpu" in finding.advice


def test_no_onnxruntime_is_fine_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", missing)
    finding = only(doctor.check_onnxruntime())
    assert finding.status == "ok"
    assert "lavintk[cpu]" in finding.advice


def test_missing_and_old_packages_are_listed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["nobody-has-this>=1", "pluggy>=999", "click>=8.1", "easy-vqa==99; extra == 'demo'"]
    monkeypatch.setattr(doctor, "requires", lambda name: declared)
    finding = only(doctor.check_packages())
    assert finding.status == "fault"
    missing, old = finding.text.split("; ")
    assert missing == "nobody-has-this is missing"
    assert old.startswith("pluggy>=999 is required, found 1.")


@pytest.mark.parametrize("package", ["torch", "bitsandbytes", "transformers", "onnxruntime"])
def test_a_package_that_cannot_be_imported_is_a_fault(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1" if name == package else missing(name))
    monkeypatch.setitem(sys.modules, package, None)
    finding = only(doctor.CHECKS[package]())
    assert (finding.area, finding.status) == (package, "fault")
    assert "cannot be imported" in finding.text
    assert f"--force-reinstall {package}" in finding.advice


# Devices


def test_bitsandbytes_without_its_native_library_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.cextension.lib", SimpleNamespace())
    first = next(doctor.check_bitsandbytes())
    assert first.status == "fault"
    assert "native library not loaded" in first.text


def test_quantization_that_gives_wrong_values_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda codes, state: 0.0)
    *_, finding = doctor.check_bitsandbytes()
    assert finding.status == "fault"
    assert "NF4 there and back on the CPU: mean error 0.797" in finding.text  # sqrt(2 / pi), roughly


def test_quantization_that_raises_is_a_fault_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel\nlong story")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    *_, finding = doctor.check_bitsandbytes()
    assert (finding.status, finding.text) == ("fault", "NF4 on the CPU fails: no kernel")


def test_a_driver_beside_a_cpu_build_of_torch_is_worth_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    finding = only(doctor.check_torch())
    assert finding.status == "advice"
    assert "CUDA build" in finding.advice


def test_a_cuda_build_that_sees_no_gpu_beside_a_driver_is_worth_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    finding = only(doctor.check_torch())
    assert finding.status == "advice"
    assert "sees no GPU" in finding.text


@pytest.mark.gpu
def test_a_gpu_is_described_and_tried() -> None:
    torch_finding, device, *_ = doctor.check_torch()
    assert torch_finding.facts["devices"]
    assert device.status == "ok"
    assert device.text.startswith("cuda:0 ")
    *_, quantized = doctor.check_bitsandbytes()
    assert (quantized.status, quantized.facts["device"]) == ("ok", "cuda")


# Hub and cache


def test_a_hub_out_of_reach_is_advice_and_an_answer_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for answer, status in ((None, "advice"), (503, "advice"), (200, "ok"), (302, "ok")):
        monkeypatch.setattr("lavintk.models.download.probe", lambda address, answer=answer: answer)
        assert only(doctor.check_hub()).status == status


def test_the_hub_is_not_asked_where_that_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(address: str) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("lavintk.models.download.probe", ask)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in only(doctor.check_hub()).text


def test_the_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path))
    finding = only(doctor.check_cache())
    assert finding.text.startswith(f"{tmp_path} holds 3.0 MiB; ")
    assert finding.facts["used_bytes"] == 3 * 2**20


def test_a_cache_that_cannot_be_a_folder_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path / "file"))
    finding = only(doctor.check_cache())
    assert finding.status == "fault"
    assert "LAVINTK_CACHE" in finding.advice


def test_little_room_is_worth_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    finding = only(doctor.check_cache())
    assert finding.status == "advice"
    assert "1.0 GiB free" in finding.text


# Plugins


def test_broken_slow_and_disabled_plugins_are_told_apart(
    install_plugin: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("broken", "import package_that_nobody_has")
    install_plugin("quitter", "print('hello'); import sys; sys.exit(3)")
    install_plugin("slow", "import time; time.sleep(0.6)")
    install_plugin("unwanted", "import package_that_nobody_has")
    monkeypatch.setenv("LAVINTK_DISABLE", "unwanted,lorra")
    found = {finding.text.split()[0]: finding for finding in doctor.check_plugins()}
    assert (found["broken"].status, found["quitter"].status) == ("fault", "fault")
    assert "LAVINTK_DISABLE=broken" in found["broken"].advice
    assert found["slow"].status == "advice"
    assert "0.6 s" in found["slow"].text
    assert (found["unwanted"].status, found["unwanted"].text) == (
        "ok",
        "unwanted is left out by LAVINTK_DISABLE",
    )
    assert found["LAVINTK_DISABLE=lorra"].text.endswith("Did you mean 'lora'?")


def test_a_clash_of_plugins_is_a_fault(install_plugin: Install) -> None:
    source = (
        "from lavintk import hookimpl\n@hookimpl\n"
        "def lavintk_register_adapters(registry):\n    registry.add('same', lambda options: None)\n"
    )
    install_plugin("one", source)
    install_plugin("two", source)
    *_, finding = doctor.check_plugins()
    assert finding.status == "fault"
    assert "adapter 'same' is offered by plugin 'one' and by plugin 'two'" in finding.text


def test_the_doctor_comes_even_where_a_broken_plugin_stops_other_commands(
    install_plugin: Install, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("broken", "import package_that_nobody_has")
    monkeypatch.setattr(doctor, "CHECKS", {"plugins": doctor.check_plugins})
    assert run_cli("plugins", "list").exit_code == 1
    outcome = run_cli("doctor")
    assert outcome.exit_code == 1
    assert "broken failed to load: ModuleNotFoundError" in outcome.stdout
