"""Does the format keep its promises, and does lavintk train on it?"""

from collections.abc import Callable
from pathlib import Path

from lavintk_csv import CsvOptions, make_csv
from PIL import Image

from lavintk.contracts import DatasetFormat
from lavintk.testing import Outcome, TinyModel, check_dataset

RunCli = Callable[..., Outcome]
GOOD = 'question,answer,image\n"what color is it, then?",red,red.png\nis it round?,no,\nhow many?,"one, or two",\n'
BAD = "question,answer,image\n,red,\nis it round?,no,lost.png\nhow many?,,\n"


def make(path: Path) -> DatasetFormat:
    return make_csv(CsvOptions(path))


def write_data(folder: Path) -> Path:
    Image.new("RGB", (28, 28), "red").save(folder / "red.png")
    (folder / "good.csv").write_text(GOOD, encoding="utf-8")
    return folder / "good.csv"


def test_the_format_keeps_its_promises(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(BAD, encoding="utf-8")
    faults = ["line 2: question", "line 3: image", "line 4: answer"]
    check_dataset(make, write_data(tmp_path), bad=tmp_path / "bad.csv", faults=faults)


def test_a_cell_may_hold_the_delimiter(tmp_path: Path) -> None:
    assert [record.reference for record in make(write_data(tmp_path)).load("train")] == ["red", "no", "one, or two"]


def test_lavintk_finds_the_plugin(run_cli: RunCli) -> None:
    assert "dataset format csv (plugin csv)" in run_cli("plugins", "show", "csv").stdout


def test_a_model_trains_on_it(run_cli: RunCli, tiny_llm: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("question,answer\nwhat color is it?,red\nis it round?,no\n", encoding="utf-8")
    data = ("--data", f"csv:{tmp_path / 'text.csv'}")
    outcome = run_cli("train", *tiny_llm.arguments(), *data, "--out", str(tmp_path / "run"))
    assert outcome.exit_code == 0, outcome.stderr
