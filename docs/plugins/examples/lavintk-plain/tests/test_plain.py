"""Does the exporter keep its promises, and does ``lavintk export`` find it?"""

from collections.abc import Callable
from pathlib import Path

import pytest
from lavintk_plain import make_plain

import lavintk
from lavintk import Run
from lavintk.errors import ModelError
from lavintk.registry import NoOptions
from lavintk.testing import Outcome, TinyModel, check_exporter

RunCli = Callable[..., Outcome]


def test_the_exporter_keeps_its_promises(tiny_run: Run) -> None:
    check_exporter(lambda: make_plain(NoOptions()), tiny_run)


def test_a_run_that_sees_images_is_refused(tiny_vlm: TinyModel, tmp_path: Path) -> None:
    run = lavintk.train(tiny_vlm.recipe(), tmp_path / "run")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="text models only"):
        make_plain(NoOptions()).export(run, tmp_path / "folder")


def test_a_run_is_exported(run_cli: RunCli, tiny_run: Run, tmp_path: Path) -> None:
    outcome = run_cli("export", str(tiny_run.folder), "--format", "plain", "--out", str(tmp_path / "folder"))
    assert outcome.exit_code == 0, outcome.stderr
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert "exporter plain (plugin plain)" in run_cli("plugins", "show", "plain").stdout
