"""ScienceQA's scores: which choice an answer names, the categories, the intervals, given answers, and a whole run."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lavintk.contracts import EvaluationResult, Likelihood
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, OptionsError, RunError
from lavintk.registry import Choice
from lavintk.run import load_records
from lavintk.scoring import evaluation_for, read_answers, score_predictions
from lavintk.testing import Outcome
from lavintk_scienceqa.categories import Share
from lavintk_scienceqa.evaluation import ScienceQa
from lavintk_scienceqa.options import ScienceQaScoring

RunCli = Callable[..., Outcome]
SUBJECTS = {"n": "natural science", "s": "social science", "l": "language science"}
ROWS = {  # subject, grade, hint, image, right choice
    "1": ("n", 1, "A hint.", True, 0),
    "2": ("n", 7, "", True, 1),
    "3": ("s", 6, "", False, 2),
    "4": ("s", 12, "A hint.", False, 0),
    "5": ("l", 3, "", False, 1),
    "6": ("l", 8, "A hint.", True, 2),
}
CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average")


def science(folder: Path, *, images: bool = False, without: Sequence[str] = (), splits: bool = True) -> Path:
    """Write six problems in ScienceQA's layout; the same ones are all splits."""
    problems = {}
    for name, (subject, grade, hint, image, answer) in ROWS.items():
        problems[name] = {
            "question": f"Which one is {name}?",
            "choices": ["red", "blue", "green"],
            "answer": answer,
            "hint": hint,
            "image": "image.png" if image else None,
            "grade": f"grade{grade}",
            "subject": SUBJECTS[subject],
            "lecture": "Look.",
            "solution": "See.",
            "split": "test",
        }
        for split in ("train", "val", "test") if image and images else ():
            from PIL import Image

            (folder / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (28, 28), ("red", "blue", "green")[answer]).save(
                folder / "images" / split / name / "image.png"
            )
    folder.mkdir(exist_ok=True)
    kept = {name: problem for name, problem in problems.items() if name not in without}
    if splits:
        kept = {name: {key: v for key, v in p.items() if key != "split"} for name, p in kept.items()}
        (folder / "pid_splits.json").write_text(json.dumps({split: list(ROWS) for split in ("train", "val", "test")}))
    (folder / "problems.json").write_text(json.dumps(kept))
    return folder


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def question(answer: int = 0, choices: int = 3, name: str = "q", **meta: Any) -> Record:
    facts = {"subject": "natural science", "grade": "grade2", "has_hint": False, "has_image": False}
    messages = (Message("user", "Which?\nResponse:"), Message("assistant", f"The answer is {'ABCDE'[answer]}."))
    return Record(name, messages, (), facts | {"choices": ("x",) * choices, "answer": answer} | meta)


def scored(answers: Mapping[str, str | int], records: Sequence[Record], **options: Any) -> EvaluationResult:
    return ScienceQa(ScienceQaScoring(**options)).score(records, answers)


# Which choice an answer names


@pytest.mark.parametrize(
    ("answer", "right", "unparsed"),
    [
        ("The answer is B.", True, 0),
        ("The answer is B", True, 0),
        ("Lecture. The answer is B. The answer is A.", True, 0),
        ("The answer is A. The answer is B.", False, 0),
        ("The answer is C.", False, 0),
        ("The answer is D.", False, 1),
        ("The answer is b.", False, 1),
        ("B", False, 1),
        ("", False, 1),
        (1, True, 0),
        (0, False, 0),
        (3, False, 1),
        (-1, False, 1),
    ],
)
def test_the_first_letter_behind_the_answer_is_counts_if_there_is_such_a_choice(
    answer: str | int, right: bool, unparsed: int
) -> None:
    result = scored({"q": answer}, [question(1)])
    assert (result.predictions[0].correct, result.scores["unparsed"]) == (right, unparsed)


def test_compat_lavin_needs_a_character_behind_the_letter_and_looks_through_the_prompt_too() -> None:
    assert scored({"q": "The answer is B"}, [question(1)], compat="lavin").scores["unparsed"] == 1
    assert scored({"q": "The answer is B,"}, [question(1)], compat="lavin").scores["unparsed"] == 0
    asked = Record("q", (Message("user", "The answer is C. Is it?"),), (), question(1).meta)
    assert not scored({"q": "The answer is B."}, [asked], compat="lavin").predictions[0].correct
    assert scored({"q": "The answer is B."}, [asked]).predictions[0].correct


def test_compat_lavin_guesses_reproducibly_among_the_choices_there_are() -> None:
    records = [question(1, choices=2 + i % 4, name=str(i)) for i in range(4000)]
    results = [scored({r.id: "?" for r in records}, records, compat="lavin", seed=seed) for seed in (0, 0, 1)]
    assert results[0].predictions == results[1].predictions
    assert results[0].predictions != results[2].predictions
    assert results[0].scores["unparsed"] == 4000
    expected = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    assert abs(results[0].scores["accuracy"] - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


# Categories and intervals


def test_each_category_is_counted_as_by_hand(tmp_path: Path) -> None:
    records = load_records(Choice("scienceqa", {"path": science(tmp_path, images=True)}), "test")
    right = {"1": "The answer is A.", "2": "The answer is A.", "3": "The answer is C.", "4": "The answer is A."}
    result = scored({**right, "5": "no idea", "6": "The answer is C."}, records)  # 2 and 5 are wrong
    counts = {name: (d["correct"], d["questions"]) for name, d in result.details.items()}
    assert counts == {
        "NAT": (1, 2), "SOC": (2, 2), "LAN": (1, 2), "TXT": (3, 3), "IMG": (2, 3), "NO": (1, 2),
        "G1-6": (2, 3), "G7-12": (2, 3), "average": (4, 6),
    }  # fmt: skip
    assert result.scores["accuracy"] == pytest.approx(4 / 6)
    assert result.scores["IMG"] == pytest.approx(2 / 3)
    assert result.scores["unparsed"] == 1
    assert [row[0] for row in result.table[1:]] == list(CATEGORIES)
    assert list(result.table[5]) == ["IMG", "66.67", result.table[5][2], "2", "3"]


def test_a_category_without_questions_has_no_accuracy() -> None:
    result = scored({"q": "The answer is A."}, [question(0)])
    assert result.details["SOC"] == {"accuracy": None, "low": None, "high": None, "correct": 0, "questions": 0}
    assert "SOC" not in result.scores
    assert result.table[2][1:3] == ["-", "-"]


def test_the_interval_is_the_one_that_drawing_answers_with_replacement_gives() -> None:
    import numpy as np

    answers = np.array([1] * 70 + [0] * 30)
    drawn = np.random.default_rng(5).choice(answers, (20_000, 100)).mean(axis=1)
    low, high = Share(70, 100).interval(seed=0, resamples=20_000)
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.0101)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.0101)
    assert (low, high) == Share(70, 100).interval(seed=0, resamples=20_000)
    assert Share(4, 4).interval(0, 100) == (1.0, 1.0)


def test_records_of_another_format_and_bad_options_are_refused() -> None:
    other = Record("r", (Message("user", "?"), Message("assistant", "A")))
    with pytest.raises(DataError, match=r"record r: no choices.*\n.*records of the format scienceqa"):
        scored({"r": "A"}, [other])
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        ScienceQaScoring(resamples=0)
    with pytest.raises(ValueError, match="does not go with scoring=likelihood"):
        ScienceQaScoring(compat="lavin", scoring="likelihood")


# Likelihood


class Weighing:
    """A model that finds ``favourite`` likeliest per token, though not in all."""

    favourite = "B"

    def answer(self, records: Sequence[Record], *, max_new_tokens: int) -> list[str]:
        raise AssertionError("nothing is to be written")

    def log_likelihoods(
        self, records: Sequence[Record], completions: Sequence[Sequence[str]]
    ) -> list[list[Likelihood]]:
        assert [len(texts) for texts in completions] == [len(record.meta["choices"]) for record in records]
        assert completions[0][:2] == ["The answer is A.", "The answer is B."]
        return [
            [Likelihood(-4.0, 4) if f" {self.favourite}." in text else Likelihood(-3.0, 2) for text in texts]
            for texts in completions
        ]


def test_the_likeliest_choice_per_token_is_the_answer() -> None:
    evaluation = ScienceQa(ScienceQaScoring(scoring="likelihood"))
    result = evaluation.evaluate(Weighing(), [question(1, name="a"), question(2, 5, name="b")], max_new_tokens=1)
    assert [(p.answer, p.correct) for p in result.predictions] == [
        ("The answer is B.", True),
        ("The answer is B.", False),
    ]
    assert result.scores["unparsed"] == 0


def test_likelihood_is_refused_where_the_answer_comes_last(tmp_path: Path) -> None:
    data = Choice("scienceqa", {"path": science(tmp_path, images=True), "prompt_format": "QCM-LEA"})
    with pytest.raises(DataError, match=r"record 1: the answer does not come first(.|\n)*QCM-ALE"):
        ScienceQa(ScienceQaScoring(scoring="likelihood")).evaluate(
            Weighing(), load_records(data, "test"), max_new_tokens=1
        )


# Which evaluation is meant


def test_the_evaluation_called_like_the_format_is_taken_unless_another_is_given() -> None:
    data, recipe = Choice("scienceqa", {"path": "x"}), Choice("exact-match")
    assert evaluation_for(data, None, recipe) == Choice("scienceqa")
    assert evaluation_for(data, Choice("exact-match"), recipe) == Choice("exact-match")
    assert evaluation_for(None, None, recipe) == recipe
    assert evaluation_for(Choice("alpaca"), None, recipe) == recipe
    own = Choice("scienceqa", {"compat": "lavin"})
    assert evaluation_for(data, None, own) == own
    assert evaluation_for(data, None, recipe, "likelihood") == Choice("scienceqa", {"scoring": "likelihood"})


# Given answers


OUTPUTS = {
    "1": "LECTURE: Look. The answer is A.",  # right
    "2": "The answer is B",  # right
    "3": "The answer is A.",  # wrong
    "4": "I do not know.",  # unparsed
    "5": "The answer is B.\n",  # right
    "6": "The answer is E.",  # no such choice
}
INDICES = {"1": 0, "2": 1, "3": 0, "4": -1, "5": 1, "6": 4}


def own_lines() -> str:
    rows = [
        {"record_id": n, "question": "?", "answer": t, "reference": "", "correct": False} for n, t in OUTPUTS.items()
    ]
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    "content",
    [
        {"outputs": OUTPUTS},
        {"results": INDICES},
        {"acc": 50.0, "correct": 3, "count": 6, "results": dict.fromkeys(OUTPUTS, 2), "outputs": OUTPUTS},
        INDICES,
        OUTPUTS,
        own_lines(),
        "\n".join(json.dumps({"question_id": n, "text": t}) for n, t in OUTPUTS.items()),
    ],
    ids=["outputs", "results", "both", "preds.json", "texts", "own", "llava rows"],
)
def test_each_form_of_answers_is_scored_as_by_hand(tmp_path: Path, run_cli: RunCli, content: Any) -> None:
    data = science(tmp_path / "data")
    answers = write(tmp_path / "answers.json", content)
    outcome = run_cli("eval", "--data", f"scienceqa:{data}", "--predictions", str(answers), "--json")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert (found["accuracy"], found["questions"], found["unparsed"]) == (0.5, 6, 2)
    correct = {name: figures["correct"] for name, figures in found["categories"].items()}
    assert correct == dict(zip(CATEGORIES, (2, 0, 1, 1, 2, 1, 2, 1, 3), strict=True))
    assert "unanswered" not in found


def test_the_table_shows_every_category_and_what_could_not_be_read(tmp_path: Path, run_cli: RunCli) -> None:
    data, answers = science(tmp_path / "data"), write(tmp_path / "answers.json", {"outputs": OUTPUTS})
    outcome = run_cli("eval", "--data", f"scienceqa:{data}", "--split", "test", "--predictions", str(answers))
    rows = {line.split()[0]: line.split() for line in outcome.stdout.splitlines() if line.split()}
    assert set(CATEGORIES) <= set(rows)
    assert (rows["average"][1], rows["average"][-2:]) == ("50.00", ["3", "6"])
    assert "unparsed answers: 2, counted as wrong" in outcome.stdout


def test_where_one_side_has_more_the_common_questions_are_scored_and_the_rest_is_said(
    tmp_path: Path, run_cli: RunCli
) -> None:
    data = science(tmp_path / "data", without=["1"])
    answers = write(tmp_path / "answers.json", {"results": {"1": 0, "2": 1, "3": 2, "99": 0}})
    command = ["eval", "--data", f"scienceqa:{data}", "--predictions", str(answers)]
    found = json.loads(run_cli(*command, "--json").stdout)
    assert (found["accuracy"], found["questions"]) == (1.0, 2)
    assert (found["unanswered"], found["unknown_answers"], found["missing_questions"]) == (3, 2, 1)
    said = run_cli(*command).stdout
    assert "scored on 2 questions: the split has 6, the data 5, the file 4" in said
    assert "3 of the data without an answer in the file: 4, 5, 6" in said
    assert "2 of the file without a question in the data: 1, 99" in said


def test_a_problems_file_alone_is_enough_and_images_are_not_needed(tmp_path: Path) -> None:
    data = science(tmp_path / "data", splits=False)
    answers = write(tmp_path / "answers.json", {"results": INDICES})
    for path in (data, data / "problems.json"):
        result = score_predictions(answers, data=Choice("scienceqa", {"path": path}))
        assert result.scores["accuracy"] == 0.5
    with pytest.raises(DataError, match=r"no split 'val'; it has test"):
        score_predictions(answers, data=Choice("scienceqa", {"path": data}), split="val")


def test_answers_without_anything_in_common_are_refused_with_both_sides_ids(tmp_path: Path) -> None:
    data, answers = science(tmp_path / "data"), write(tmp_path / "answers.json", {"results": {"77": 0}})
    with pytest.raises(DataError, match=r"its 1 ids \(77\) are not among those of .*\(1, 2, 3, 4, 5, \.\.\.\)"):
        score_predictions(answers, data=Choice("scienceqa", {"path": data}))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"results": {"1": None, "2": True}}, "id '1': expected a text or the index of a choice, found null"),
        ({"outputs": []}, "outputs: expected an object of answers by id, found []"),
        ("{", "line 1, column 2: not valid JSON"),
        ({}, "it holds no answers"),
        ('{"record_id": "1", "answer": "A"}\n{"record_id": "1", "answer": "A"}', "line 2: a second answer to '1'"),
        (
            '{"record_id": "1", "answer": "A"}\n{"id": 1}',
            "line 2: expected record_id or question_id, and answer or text",
        ),
        ("3", "record 1: expected record_id or question_id"),
    ],
)
def test_faults_of_a_file_of_answers_are_named(tmp_path: Path, content: Any, fault: str) -> None:
    with pytest.raises(DataError) as caught:
        read_answers(write(tmp_path / "answers.json", content))
    assert any(found.startswith(fault) for found in caught.value.faults)


def test_a_missing_file_of_answers_points_to_the_flag_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file\nTo write the answers of a run, use --save-predictions"):
        read_answers(tmp_path / "none.json")


def test_flags_that_do_not_go_with_given_answers_are_refused(tmp_path: Path, run_cli: RunCli) -> None:
    answers = write(tmp_path / "a.json", {"results": {"1": 0}})
    for arguments, text in (
        (["run", "--predictions", str(answers)], "leave run out"),
        (["--predictions", str(answers), "--device", "cpu"], "--device would change nothing"),
        (["--predictions", str(answers)], "answers are scored against records; name them"),
        ([], "name the RUN whose model answers, or a file of answers with --predictions"),
    ):
        outcome = run_cli("eval", *arguments)
        assert outcome.exit_code == 1
        assert text in outcome.stderr


def test_exact_match_scores_given_texts_and_refuses_numbers(tmp_path: Path) -> None:
    data = Choice("alpaca", {"path": write(tmp_path / "d.json", [{"instruction": "a", "output": "Yes."}] * 2)})
    result = score_predictions(write(tmp_path / "a.json", {"d-1": "yes", "d-2": "no"}), data=data)
    assert (result.scores["accuracy"], result.scores["questions"]) == (0.5, 2)
    with pytest.raises(DataError, match="record d-1: the answer is the number 0"):
        score_predictions(write(tmp_path / "b.json", {"d-1": 0}), data=data)


def test_an_evaluation_that_cannot_score_given_answers_says_so(
    tmp_path: Path, install_plugin: Callable[..., Path], run_cli: RunCli
) -> None:
    source = (
        "import lavintk\n"
        "class Nothing:\n    def evaluate(self, model, records, *, max_new_tokens): ...\n"
        "@lavintk.hookimpl\ndef lavintk_register_evaluations(registry):\n"
        "    registry.add('nothing', lambda options: Nothing())\n"
    )
    install_plugin("nothing", source)
    arguments = ("--data", f"scienceqa:{science(tmp_path / 'd')}", "--evaluation", "nothing")
    outcome = run_cli("eval", *arguments, "--predictions", str(write(tmp_path / "a.json", INDICES)))
    assert "evaluation 'nothing' cannot score answers that exist already" in outcome.stderr


def test_scoring_given_answers_loads_no_torch(tmp_path: Path) -> None:
    data, answers = science(tmp_path / "data"), write(tmp_path / "answers.json", {"outputs": OUTPUTS})
    code = (
        "import sys; from lavintk.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "eval", "--data", f"scienceqa:{data}", "--predictions", str(answers)]
    subprocess.run(command, check=True, capture_output=True)


# A whole run


def test_a_tiny_set_goes_through_training_and_both_kinds_of_scoring(
    tmp_path: Path, tiny_folder: Path, run_cli: RunCli
) -> None:
    from lavintk.training import train

    data = science(tmp_path / "data", images=True)
    run = tmp_path / "run"
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"language": str(tiny_folder / "llm"), "vision": str(tiny_folder / "vit"), "tap_every": 2, "neck": 8},
        "quant": "nf4",
        "adapter": "mma",
        "optim": "paged",
        "data": {
            "train": {"name": "scienceqa", "path": str(data), "prompt_format": "QCM-ALE"},
            "test": {"name": "scienceqa", "path": str(data), "prompt_format": "QCM-ALE"},
            "template": "lavin",
        },
        "train": {"batch_size": 6, "lr": 2e-2, "device": "cpu", "max_steps": 40},
        "evaluation": {"name": "scienceqa", "before": False, "max_new_tokens": 24},
    }
    from lavintk.recipe import make_recipe

    train(make_recipe(recipe), run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["evaluation"]["questions"] == 6
    assert {"NAT", "IMG", "G7-12", "unparsed"} <= set(manifest["evaluation"])

    saved = tmp_path / "answers.jsonl"
    command = ["eval", str(run), "--data", f"scienceqa:{data}", "--split", "test"]
    outcome = run_cli(*command, "--save-predictions", str(saved))
    assert outcome.exit_code == 0, outcome.stderr
    shown = [line.split() for line in outcome.stdout.splitlines() if line.strip()]
    assert [line[0] for line in shown[1:10]] == list(CATEGORIES)
    assert [line[-1] for line in shown[1:10]] == ["2", "2", "2", "3", "3", "2", "3", "3", "6"]
    assert outcome.stdout == run_cli("eval", "--data", f"scienceqa:{data}", "--predictions", str(saved)).stdout

    weighed = json.loads(run_cli(*command, "--scoring", "likelihood", "--json").stdout)
    assert weighed["unparsed"] == 0
    assert weighed["categories"]["average"]["questions"] == 6

    refused = run_cli(*command, "--evaluation", "exact-match", "--scoring", "likelihood")
    assert "unknown option 'scoring'" in refused.stderr


def test_errors_of_options_name_the_evaluation(run_cli: RunCli, tmp_path: Path) -> None:
    answers = write(tmp_path / "a.json", INDICES)
    with pytest.raises(OptionsError, match="evaluation 'scienceqa'"):
        score_predictions(
            answers,
            data=Choice("scienceqa", {"path": science(tmp_path / "d")}),
            evaluation=Choice("scienceqa", {"compat": "x"}),
        )
    with pytest.raises(RunError, match="name them"):
        score_predictions(answers)
