"""Does lavintk tell the logger what happens, and does it write that down?"""

import csv
from collections.abc import Callable
from pathlib import Path

import lavintk_csvlog

from lavintk.contracts import RunInfo
from lavintk.testing import Outcome, TinyModel

RunCli = Callable[..., Outcome]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert any(line.startswith("csvlog ") for line in run_cli("plugins", "list").stdout.splitlines())


def test_a_run_is_written_down(run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path) -> None:
    outcome = run_cli("train", *tiny_llm.arguments(steps=2), "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr
    written = tmp_path / "run" / lavintk_csvlog.FOLDER
    assert rows(written / "steps.csv")[-1]["step"] == "2"
    assert float(rows(written / "steps.csv")[-1]["loss"]) > 0
    assert rows(written / "runs.csv")[-1]["status"] == "finished"


def test_a_run_that_goes_on_adds_to_the_files(tmp_path: Path) -> None:
    for status in ("interrupted", "finished"):
        lavintk_csvlog.lavintk_run_finished(RunInfo(tmp_path, "twice", {}, 2, 10), status)
    written = rows(tmp_path / lavintk_csvlog.FOLDER / "runs.csv")
    assert [row["status"] for row in written] == ["interrupted", "finished"]
