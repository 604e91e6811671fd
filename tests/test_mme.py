"""MME's scores by hand, its answer files, its folder, and a run that answers it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavintk.errors import DataError
from lavintk.registry import Choice
from lavintk.run import load_records
from lavintk.scoring import score_predictions
from lavintk.testing import Outcome
from lavintk_mme.subtasks import COGNITION, PERCEPTION, SUBTASKS, verdict

RunCli = Callable[..., Outcome]
MME = Choice("mme")


def answer_files(folder: Path, answers: dict[str, list[tuple[str, str, str]]]) -> Path:
    """Write ``<subtask>.txt`` with lines image, question, reference, answer."""
    folder.mkdir()
    for subtask, lines in answers.items():
        text = "".join(f"{image}\tIs it? Please answer yes or no.\t{gt}\t{said}\n" for image, gt, said in lines)
        (folder / f"{subtask}.txt").write_text(text)
    return folder


def benchmark(folder: Path, images: bool = True) -> Path:
    """Write two sub-tasks, one in each of the two layouts, two images each."""
    from PIL import Image

    for subtask, texts, pictures, ending in (
        ("existence", "", "", "jpg"),
        ("artwork", "questions_answers_YN", "images", "png"),
    ):
        for number in (1, 2):
            path = folder / subtask / texts / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"Is there a {number}? Please answer yes or no.\tYes\nIs it dark?\tNo")
            if images:
                (folder / subtask / pictures).mkdir(exist_ok=True)
                Image.new("RGB", (28, 28), "red").save(folder / subtask / pictures / f"{number}.{ending}")
    return folder


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("Yes, there is.", "yes"),
        (" no", "no"),
        ("Not yes", "no"),
        ("I know", "other"),
        ("It is no", "other"),
        ("not", "no"),
        ("", "other"),
        ("nyes", "yes"),
        ("The answer is yes", "other"),
    ],
)
def test_only_the_first_four_characters_of_an_answer_count(answer: str, expected: str) -> None:
    assert verdict(answer) == expected


def test_there_are_ten_sub_tasks_of_perception_and_four_of_cognition() -> None:
    assert (len(PERCEPTION), len(COGNITION), len(set(SUBTASKS))) == (10, 4, 14)


def test_scores_of_answer_files_are_those_counted_by_hand(tmp_path: Path, run_cli: RunCli) -> None:
    folder = answer_files(
        tmp_path / "answers",
        {
            # 5 of 8 right = 62.5; images a and d both right, of a, b, c, d = 50
            "existence": [
                ("a.jpg", "Yes", "Yes, it is"), ("a.jpg", "No", "no"),
                ("b.jpg", "Yes", "Yes"), ("b.jpg", "No", "Yes"),
                ("c.jpg", "Yes", "maybe"), ("c.jpg", "No", "maybe"),
                ("d.jpg", "Yes", "yes"), ("d.jpg", "No", "No"),
            ],
            # the same image twice makes two pairs: 3 of 4 right = 75, one pair = 50
            "OCR": [("e.png", "Yes", "yes"), ("e.png", "No", "no"), ("e.png", "Yes", "yes"), ("e.png", "No", "yes")],
            "code_reasoning": [("f.png", "Yes", "Yes"), ("f.png", "No", "Yes")],  # 50 and 0
        },
    )  # fmt: skip
    outcome = run_cli("eval", "--evaluation", "mme", "--predictions", str(folder), "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    parts = {
        name: [figures.get(key) for key in ("acc", "acc+", "score")] for name, figures in found["categories"].items()
    }
    assert parts == {
        "existence": [62.5, 50.0, 112.5],
        "OCR": [75.0, 50.0, 125.0],
        "code_reasoning": [50.0, 0.0, 50.0],
        "perception": [None, None, 237.5],
        "cognition": [None, None, 50.0],
    }
    assert (found["perception"], found["cognition"], found["questions"], found["other"]) == (237.5, 50.0, 14, 2)
    assert found["accuracy"] == pytest.approx(9 / 14)
    assert "the sums are over 3 of 14 sub-tasks" in found["notes"][-1]

    shown = run_cli("eval", "--evaluation", "mme", "--predictions", str(folder)).stdout
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert rows["existence"] == ["62.50", "50.00", "112.50", "200", "4", "2"]
    assert rows["perception"] == ["237.50", "400"]


def test_all_right_answers_reach_2000_and_800(tmp_path: Path) -> None:
    lines = [("a.jpg", "Yes", "Yes"), ("a.jpg", "No", "No")]
    result = score_predictions(answer_files(tmp_path / "a", dict.fromkeys(SUBTASKS, lines)), evaluation=MME)
    assert (result.scores["perception"], result.scores["cognition"]) == (2000, 800)
    assert [row[0] for row in result.table[1:]] == [*PERCEPTION, "perception", *COGNITION, "cognition"]
    assert result.notes == ()


def test_always_yes_scores_fifty_and_nothing_for_pairs(tmp_path: Path) -> None:
    lines = [("a.jpg", "Yes", "Yes"), ("a.jpg", "No", "Yes")] * 3
    result = score_predictions(answer_files(tmp_path / "a", {"position": lines}), evaluation=MME)
    assert result.scores["perception"] == 50


def test_every_fault_of_the_answer_files_is_named(tmp_path: Path) -> None:
    folder = answer_files(tmp_path / "a", {"count": [("a.jpg", "Yes", "Yes"), ("b.jpg", "No", "No")], "color": []})
    (folder / "scene.txt").write_text("a.jpg\tIs it?\tYes\n" + "a.jpg\tIs it?\tPerhaps\tYes\n")
    (folder / "OCR.txt").write_text("a.jpg\tIs it?\tYes\tYes\n")
    with pytest.raises(DataError) as caught:
        score_predictions(folder, evaluation=MME)
    assert caught.value.faults == (
        "count.txt: the lines of an image must be adjacent, found 'a.jpg' and 'b.jpg'",
        "scene.txt, line 1: expected image, question, reference and answer with tabs between",
        "scene.txt, line 2: the reference must be Yes or No, found 'Perhaps'",
        "OCR.txt: image 'a.jpg' has one line instead of two",
        "color.txt: it holds no answers",
        "scene.txt: it holds no answers",
    )
    for path, fault in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no <subtask>.txt; the sub-tasks are existence"),
    ):
        with pytest.raises(DataError, match=fault):
            score_predictions(path, evaluation=MME)


def test_files_of_other_names_are_left_aside_and_named(tmp_path: Path) -> None:
    folder = answer_files(tmp_path / "a", {"count": [("a.jpg", "Yes", "Yes"), ("a.jpg", "No", "No")], "notes": []})
    result = score_predictions(folder, evaluation=MME)
    assert result.notes[0] == "not read, because no sub-task is called so: notes.txt"


# The benchmark's folder


def test_both_layouts_of_a_sub_task_are_read(tmp_path: Path) -> None:
    records = load_records(Choice("mme", {"path": benchmark(tmp_path)}), "test")
    assert [record.id for record in records] == [
        f"{subtask}/{number}.{ending}/{place}"
        for subtask, ending in (("existence", "jpg"), ("artwork", "png"))
        for number in (1, 2)
        for place in (1, 2)
    ]
    first = records[0]
    assert (first.question, first.reference) == ("Is there a 1? Please answer yes or no.", "Yes")
    assert first.images == (tmp_path / "existence" / "1.jpg",)
    assert records[4].images == (tmp_path / "artwork" / "images" / "1.png",)
    assert len(load_records(Choice("mme", {"path": tmp_path, "limit": 1}), "test")) == 4


def test_every_fault_of_the_folder_is_named(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "mme")
    (folder / "existence" / "2.jpg").unlink()
    (folder / "existence" / "1.txt").write_text("Is it?\tYes\nIs it not?\n")
    (folder / "artwork" / "questions_answers_YN" / "1.txt").write_text("Is it?\tYes\n")
    (folder / "color").mkdir()
    with pytest.raises(DataError) as caught:
        load_records(Choice("mme", {"path": folder}), "test")
    assert caught.value.faults == (
        "existence/1.txt, line 2: expected question, tab, Yes or No, found 'Is it not?'",
        "existence/2.txt: no image of this name ending in .jpg, .png, .jpeg",
        "color: no text files with questions",
        "artwork/1.txt: expected two lines, found 1",
    )
    with pytest.raises(DataError, match="no folder of a sub-task"):
        load_records(Choice("mme", {"path": folder / "color"}), "test")


def test_answers_to_the_folders_questions_are_scored_without_its_images(tmp_path: Path) -> None:
    folder = benchmark(tmp_path / "mme", images=False)
    answers = {f"existence/1/{n}": said for n, said in ((1, "yes"), (2, "no"))} | {"artwork/1/1": "yes"}
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers))
    result = score_predictions(path, data=Choice("mme", {"path": folder}))
    assert result.details["existence"]["score"] == 200
    assert any(note.startswith("1 images left out") for note in result.notes)


def test_a_run_answers_and_scores_the_folder(tmp_path: Path, tiny_folder: Path, run_cli: RunCli) -> None:
    from lavintk.recipe import make_recipe
    from lavintk.testing.runs import multimodal
    from lavintk.training import train

    recipe: dict[str, Any] = multimodal(tiny_folder, max_steps=1)
    train(make_recipe(recipe), tmp_path / "run")
    data = f"mme:{benchmark(tmp_path / 'mme')}"
    saved = tmp_path / "answers.jsonl"
    outcome = run_cli("eval", str(tmp_path / "run"), "--data", data, "--json", "--save-predictions", str(saved))
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found["questions"] == 8
    assert list(found["categories"]) == ["existence", "artwork", "perception"]
    again = json.loads(run_cli("eval", "--data", data, "--predictions", str(saved), "--json").stdout)
    assert again == found
