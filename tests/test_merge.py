"""``lavintk data merge``: Alpaca's and LLaVA's files to LaVIN's all_data.json, and back into records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lavintk.data.merge import as_prompt, merge
from lavintk.errors import DataError, LavintkError
from lavintk.registry import Choice
from lavintk.run import load_records
from lavintk.testing import Outcome

RunCli = Callable[..., Outcome]
ALPACA = [
    {"instruction": "Translate.", "input": "Good  morning", "output": "Bonjour"},
    {"instruction": "Name a prime.", "input": "", "output": "7"},
    {"instruction": "Say nothing.", "output": ""},
]
TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A  cat."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Black."},
]
LLAVA = [
    {"id": "000000033471", "image": "000000033471.jpg", "conversations": TURNS[:2]},
    {"id": "000000033471", "image": "COCO_train2014_000000033471.jpg", "conversations": TURNS},
]
SECOND = [
    {"id": "x", "image": "1.jpg", "conversations": [{"from": "human", "value": "Where?\n<image>"}, TURNS[1]]},
    {"id": "text", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def sources(folder: Path) -> list[Path]:
    return [write(folder / f"{n}.json", content) for n, content in enumerate((ALPACA, LLAVA, SECOND))]


def picture(folder: Path, name: str) -> None:
    (folder / "train2014").mkdir(parents=True, exist_ok=True)
    (folder / "train2014" / f"COCO_train2014_{name}").write_bytes(b"not read")


def test_rows_are_those_that_lavins_scripts_would_write(tmp_path: Path, run_cli: RunCli) -> None:
    alpaca, first, second = sources(tmp_path)
    out = tmp_path / "all_data.json"
    command = ["data", "merge", "--alpaca", str(alpaca), "--llava", str(first), "--llava", str(second)]
    outcome = run_cli(*command, "--out", str(out))
    assert outcome.exit_code == 0, outcome.stderr
    assert "7 rows (3 from alpaca, 4 from llava; 1 with several turns, 3 with an image)" in outcome.stdout
    rows = json.loads(out.read_text(encoding="utf-8"))["all"]
    assert rows[0] == {
        "instruction": "Instruction: Translate. Good morning\nResponse:",
        "answer": "Bonjour",
        "image": None,
        "options": None,
        "image_source": None,
        "qid": "alpaca_0",
    }
    assert [row["qid"] for row in rows] == ["alpaca_0", "alpaca_1", "alpaca_2", "gpt4_0", "gpt4_1", "gpt4_2", "gpt4_3"]
    assert rows[3] == {
        "instruction": "Instruction: What is it?\nResponse:",
        "answer": "A  cat.",
        "image": "000000033471.jpg",
        "options": None,
        "image_source": "mscoco",
        "qid": "gpt4_0",
    }
    assert rows[4]["image"] == "000000033471.jpg"
    assert rows[4]["conversations"] == [
        {"from": "human", "value": "Instruction: What is it?\nResponse:"},
        {"from": "gpt", "value": "A  cat."},
        {"from": "human", "value": "Instruction: Which colour?\nResponse:"},
        {"from": "gpt", "value": "Black."},
    ]
    assert rows[5]["instruction"] == "Instruction: Where?\nResponse:"
    assert (rows[6]["image"], rows[6]["image_source"]) == (None, None)


def test_the_same_files_give_the_same_bytes_and_an_old_file_is_replaced(tmp_path: Path) -> None:
    alpaca, *llava = sources(tmp_path)
    out, again = tmp_path / "a.json", write(tmp_path / "b.json", "old")
    merge([alpaca], llava, out)
    merge([alpaca], llava, again)
    assert out.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json", "a.json", "b.json"]


def test_the_reader_gets_every_turn_back(tmp_path: Path) -> None:
    alpaca, *llava = sources(tmp_path)
    for name in ("000000033471.jpg", "1.jpg"):
        picture(tmp_path / "images", name)
    merge([alpaca], llava, tmp_path / "all_data.json", tmp_path / "images")
    records = {r.id: r for r in load_records(Choice("lavin", {"path": tmp_path / "all_data.json"}), "train")}
    assert len(records) == 7
    several = records["gpt4_1"]
    assert [(m.role, m.text) for m in several.messages] == [
        ("user", "Instruction: What is it?\nResponse:"),
        ("assistant", "A  cat."),
        ("user", "Instruction: Which colour?\nResponse:"),
        ("assistant", "Black."),
    ]
    assert several.images == (tmp_path / "images" / "train2014" / "COCO_train2014_000000033471.jpg",)
    assert several.meta["raw_prompt"]
    assert len(records["gpt4_0"].messages) == 2


def test_each_answer_of_several_turns_is_trained_and_nothing_else(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    from lavintk.data.batch import IGNORED
    from lavintk.data.template import make_template

    row = {"instruction": "", "answer": "", "image": None, "qid": "q", "conversations": [
        {"from": "human", "value": as_prompt("a?")}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": as_prompt("b?")}, {"from": "gpt", "value": "no"}]}  # fmt: skip
    (record,) = load_records(Choice("lavin", {"path": write(tmp_path / "d.json", {"all": [row]})}), "train")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "llm")
    tokens = make_template(tokenizer, "lavin", visual_tokens=6).tokenize_record(record)
    trained = [label for label in tokens.labels if label != IGNORED]
    assert tokenizer.decode(trained) == "yes</s>no</s>"
    text = tokenizer.decode(tokens.input_ids, skip_special_tokens=True)
    assert text == "Image: N/AInstruction: a?\nResponse:yesInstruction: b?\nResponse:no"


def test_faulty_conversations_are_reported_by_the_reader(tmp_path: Path) -> None:
    row = {"instruction": "a", "answer": "b", "image": None, "qid": "q", "conversations": [{"from": "cat", "value": 1}]}
    with pytest.raises(DataError, match=r"conversations\[0\]\.from: expected one of human"):
        load_records(Choice("lavin", {"path": write(tmp_path / "d.json", {"all": [row]})}), "train")


def test_every_fault_of_every_file_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    alpaca = write(tmp_path / "a.json", [{"instruction": 1, "output": "x"}, {"instruction": "y"}, ALPACA[0]])
    lines = tmp_path / "l.jsonl"
    lines.write_text(json.dumps({"conversations": TURNS[:1], "image": "a/b.jpg"}) + "\n{\n" + json.dumps(
        {"conversations": [TURNS[1], {"from": "gpt", "value": "<image>"}]}) + "\n[]\n")  # fmt: skip
    missing = write(tmp_path / "m.json", LLAVA[:1])
    with pytest.raises(DataError) as caught:
        merge([alpaca, tmp_path / "none.json"], [lines, missing], tmp_path / "out.json", tmp_path / "images")
    place = tmp_path / "images" / "train2014" / "COCO_train2014_000000033471.jpg"
    assert caught.value.faults == (
        f"{alpaca}, record 1: instruction: expected text, found 1",
        f"{alpaca}, record 2: output: expected text, found null",
        f"{tmp_path / 'none.json'}: No such file or directory",
        f"{lines}, line 1: conversations: the last question has no answer",
        f'{lines}, line 1: image: expected the name of a file of COCO\'s train2014, found "a/b.jpg"',
        f"{lines}, line 2: expected a JSON list or one object per line: "
        "Expecting property name enclosed in double quotes",
        f"{lines}, line 3: conversations[0].from: expected 'human', since both take turns, found \"gpt\"",
        f"{lines}, line 3: conversations[1].value: the marker <image> belongs in the first question",
        f"{lines}, line 4: expected an object with fields, found []",
        f"{missing}, record 1: image: no image file {place}",
    )
    assert not (tmp_path / "out.json").exists()


def test_a_marker_without_an_image_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the marker <image> in the first question, but no image"):
        merge([], [write(tmp_path / "l.json", [{"conversations": TURNS[:2]}])], tmp_path / "out.json")


def test_bad_calls_are_refused(tmp_path: Path, run_cli: RunCli) -> None:
    alpaca = write(tmp_path / "a.json", ALPACA)
    with pytest.raises(LavintkError, match="is one of the files to merge"):
        merge([alpaca], [], alpaca)
    with pytest.raises(LavintkError, match="does not exist"):
        merge([alpaca], [], tmp_path / "no" / "out.json")
    outcome = run_cli("data", "merge", "--out", str(tmp_path / "o.json"))
    assert (outcome.exit_code, "there is nothing to merge" in outcome.stderr) == (1, True)
    assert json.loads(alpaca.read_text()) == ALPACA
