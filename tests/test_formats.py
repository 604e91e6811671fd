"""Record formats: what each file becomes, and that every fault of a file is reported at once."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lavintk.contracts import DatasetFormat
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, OptionsError
from lavintk.registry import Choice, Registry
from lavintk_formats import lavintk_register_datasets


def load(name: str, split: str = "train", **options: Any) -> list[Record]:
    registry: Registry[DatasetFormat] = Registry("dataset format")
    lavintk_register_datasets(registry)
    return registry.create(Choice(name, options)).load(split)


def faults_of(name: str, split: str = "train", **options: Any) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        load(name, split, **options)
    return caught.value.faults


def write(path: Path, content: Any) -> Path:
    """Write JSON, or JSONL for a tuple; text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        content = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def png_bytes() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


def png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes())
    return path


def texts(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in record.messages]


def test_the_plugin_imports_neither_torch_nor_pillow_nor_easy_vqa() -> None:
    heavy = ("torch", "PIL", "easy_vqa", "numpy")
    code = f"import sys, lavintk_formats; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_has_a_help_text() -> None:
    registry: Registry[DatasetFormat] = Registry("dataset format")
    lavintk_register_datasets(registry)
    assert registry.names() == ["alpaca", "easyvqa", "jsonl", "lavin", "llava", "openai", "scienceqa"]
    assert not [(e.name, o.name) for e in registry for o in e.declared_options() if not o.help]


# alpaca


def test_alpaca_reads_a_list_and_jsonl_alike(tmp_path: Path) -> None:
    rows = (
        {"instruction": "Add", "input": "1+1", "output": "2"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    )
    from_list = load("alpaca", path=write(tmp_path / "data.json", list(rows)))
    from_lines = load("alpaca", path=write(tmp_path / "data.jsonl", rows))
    assert from_list == from_lines
    assert texts(from_list[0]) == [("user", "Add\n1+1"), ("assistant", "2")]
    assert texts(from_list[1]) == [("user", "Hi"), ("assistant", "Hello")]
    assert [record.id for record in from_list] == ["data-1", "data-2"]


def test_all_faults_of_a_file_come_together_with_line_and_field(tmp_path: Path) -> None:
    rows = (
        {"instruction": "a", "ouput": "b"},
        "{broken\n",
        "\n",
        {"instruction": 7, "output": None},
        '"text"\n',
    )
    faults = faults_of("alpaca", path=write(tmp_path / "bad.jsonl", rows))
    assert [fault.split(":")[0] for fault in faults] == [
        "line 1",
        "line 2, column 2",
        *["line 4"] * 2,
        "line 5",
    ]
    assert "output: missing; the row holds: instruction, ouput. Did you mean 'ouput'?" in faults[0]
    assert "instruction: expected text, found 7" in faults[2]
    assert "output: expected text, found null" in faults[3]
    assert 'expected an object with fields, found "text"' in faults[4]


def test_faults_of_a_list_name_the_record_and_its_id(tmp_path: Path) -> None:
    rows = [{"id": "x", "instruction": "a", "output": "b"}, {"id": "y", "instruction": "a"}]
    assert faults_of("alpaca", path=write(tmp_path / "a.json", rows))[0].startswith(
        "record 2 (id 'y'): output: missing"
    )


def test_a_limit_reads_only_the_first_records(tmp_path: Path) -> None:
    rows = ({"instruction": "a", "output": "b"},) * 3 + ("broken\n",)
    path = write(tmp_path / "a.jsonl", rows)
    assert len(load("alpaca", path=path, limit="2")) == 2
    with pytest.raises(OptionsError, match="limit must be 0"):
        load("alpaca", path=path, limit=-1)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_data_is_an_error(tmp_path: Path, content: str) -> None:
    assert faults_of("alpaca", path=write(tmp_path / "a.json", content)) == ("it holds no records",)


def test_missing_files_folders_and_other_encodings_are_errors(tmp_path: Path) -> None:
    assert faults_of("alpaca", path=tmp_path / "none.json") == ("no such file",)
    assert faults_of("alpaca", path=tmp_path) == ("it is a folder; name the file",)
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "é", "output": "b"}\n'.encode("latin-1"))
    assert "line 1: byte 17 is not UTF-8" in faults_of("alpaca", path=tmp_path / "latin.jsonl")[0]
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    assert faults_of("alpaca", path=tmp_path / "latin.json") == ("byte 2 is not UTF-8",)
    assert "line 2, column 1: not valid JSON" in faults_of("alpaca", path=write(tmp_path / "cut.json", '["a",\n'))[0]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8-sig")
    assert len(load("alpaca", path=tmp_path / "bom.jsonl")) == 1


def test_repeated_ids_are_made_unique(tmp_path: Path) -> None:
    rows = ({"id": 5, "instruction": "a", "output": "b"},) * 2
    assert [r.id for r in load("alpaca", path=write(tmp_path / "a.jsonl", rows))] == [
        "5",
        "5 (line 2)",
    ]


# openai


def test_openai_reads_text_paths_and_data_urls(tmp_path: Path) -> None:
    image = png(tmp_path / "pictures" / "a.png")
    url = "data:image/png;base64," + base64.b64encode(png_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": "pictures/a.png"}},
        {"type": "text", "text": "or"},
        {"type": "image", "image": url},
        {"type": "text", "text": "?"},
    ]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "The first."},
        ]
    }
    (record,) = load("openai", path=write(tmp_path / "chat.jsonl", (row,)))
    assert texts(record) == [
        ("system", "Be brief."),
        ("user", "<image>or<image>?"),
        ("assistant", "The first."),
    ]
    assert record.images == (image, png_bytes())


def test_openai_reports_every_fault_with_line_and_place(tmp_path: Path) -> None:
    def row(*messages: Any, **more: Any) -> dict[str, Any]:
        return {"messages": list(messages), **more}

    question = {"role": "user", "content": "q"}
    remote = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    rows = (
        row({"role": "user", "content": [remote]}),
        row({"role": "user", "content": [{"type": "image_url", "image_url": "missing.png"}]}),
        row({"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,@@"}]}),
        row(question, {"role": "tool", "content": "x"}),
        row(question, {"role": "assistant", "content": None, "tool_calls": [{}]}),
        row(question, {"role": "assistant", "content": "a", "weight": 0}),
        row({"role": "user", "content": [{"type": "input_audio"}]}),
        row(),
        row({"role": "system", "content": "only"}),
        row({"role": "user", "content": "what is <image>?"}),
        row(question, {"role": "assistant", "content": "a"}, tools=[{}]),
        row({"role": "user", "content": [{"type": "image"}]}),
    )
    faults = faults_of("openai", path=write(tmp_path / "bad.jsonl", rows))
    expected = [
        ("line 1: messages[0].content[0].image_url:", "is not a local file; download the image"),
        ("line 2: messages[0].content[0].image_url:", f"no image file {tmp_path / 'missing.png'}"),
        ("line 3: messages[0].content[0].image_url:", "cannot read the data: URL"),
        ("line 4: messages[1].role:", 'found "tool"'),
        ("line 5: messages[1].tool_calls:", "tools are not supported"),
        ("line 5: messages[1].content:", "found null"),
        ("line 6: messages[1].weight:", "found 0"),
        ("line 7: messages[0].content[0]:", "input_audio"),
        ("line 8: messages:", "expected a list of messages, found []"),
        ("line 9: messages:", "no user message with text"),
        ("line 10: messages:", "1 markers <image> in the text, 0 images"),
        ("line 11: tools:", "tools are not supported"),
        ("line 12: messages[0].content[0].image:", "expected a path or a data: URL, found null"),
    ]
    assert len(faults) == len(expected)
    for fault, (start, text) in zip(faults, expected, strict=True):
        assert fault.startswith(start)
        assert text in fault


# llava


def test_llava_reads_conversations_and_finds_images_in_the_folder(tmp_path: Path) -> None:
    image = png(tmp_path / "coco" / "1.jpg")
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Colour?"), ("gpt", "Red.")]
    row = {"id": "7", "image": "1.jpg", "conversations": [{"from": f, "value": v} for f, v in turns]}
    (record,) = load("llava", path=write(tmp_path / "llava.json", [row]), images=tmp_path / "coco")
    assert record.id == "7"
    assert record.images == (image,)
    assert texts(record)[::3] == [("user", "<image>\nWhat?"), ("assistant", "Red.")]
    assert len(record.messages) == 4


def test_llava_reports_all_missing_images_and_wrong_turns(tmp_path: Path) -> None:
    good = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"id": "a", "image": "1.jpg", "conversations": good},
        {"id": "b", "image": "2.jpg", "conversations": good},
        {"id": "c", "conversations": [{"from": "bot", "value": "q"}, {"from": "gpt"}, "x"]},
        {"id": "d", "conversations": [good[0], {"from": "gpt", "value": "see <image>"}]},
    ]
    faults = faults_of("llava", path=write(tmp_path / "llava.json", rows))
    assert faults[0] == f"record 1 (id 'a'): image: no image file {tmp_path / '1.jpg'}"
    assert faults[1] == f"record 2 (id 'b'): image: no image file {tmp_path / '2.jpg'}"
    assert "record 3 (id 'c'): conversations[0].from: expected one of human" in faults[2]
    assert "record 3 (id 'c'): conversations[1].value: expected text, found null" in faults[3]
    assert "record 3 (id 'c'): conversations[2]: expected an object" in faults[4]
    assert "the marker <image> outside a user message" in faults[5]


# lavin


def test_lavin_reads_all_data_with_coco_and_scienceqa_images(tmp_path: Path) -> None:
    coco = png(tmp_path / "images" / "train2014" / "COCO_train2014_000000000009.jpg")
    sqa = png(tmp_path / "images" / "train" / "12" / "image.png")
    prompt = "Instruction: What?\nResponse:"

    def row(qid: str, image: str | None, source: str | None) -> dict[str, Any]:
        names = {"qid": qid, "image": image, "image_source": source, "options": None}
        return {"instruction": prompt, "answer": "This.", **names}

    rows = [
        row("alpaca_1", None, None),
        row("gpt4_1", "000000000009.jpg", "mscoco"),
        row("12", "image.png", "sqa"),
    ]
    records = load("lavin", path=write(tmp_path / "all_data.json", {"all": rows}))
    assert [record.images for record in records] == [(), (coco,), (sqa,)]
    assert [record.id for record in records] == ["alpaca_1", "gpt4_1", "12"]
    assert texts(records[0]) == [("user", prompt), ("assistant", "This.")]
    assert all(record.meta["raw_prompt"] for record in records)
    bad = write(tmp_path / "bad.json", {"all": [row("1", "a.jpg", "flickr"), row("2", "b.jpg", "mscoco")]})
    faults = faults_of("lavin", path=bad)
    assert "image_source: expected 'mscoco' or 'sqa', found \"flickr\"" in faults[0]
    assert "COCO_train2014_b.jpg" in faults[1]
    assert "expected an object with the key 'all'" in faults_of("lavin", path=write(tmp_path / "l.json", rows))[0]


# scienceqa

PROBLEM = {
    "question": "Which  is red?",
    "choices": ["apple", "sky", "sea"],
    "answer": 0,
    "hint": "Look.",
    "image": None,
    "grade": "grade3",
    "subject": "natural science",
    "lecture": "Line one.\nLine two.",
    "solution": "Apples are red.",
    "split": "train",
}
LECTURE = "Line one.\\nLine two."


def science(folder: Path, problems: dict[str, Any], **splits: list[str]) -> Path:
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", splits or {"train": list(problems), "val": [], "test": []})
    return folder


def pair(folder: Path, problem: dict[str, Any], prompt_format: str, **options: Any) -> tuple[str, str]:
    path = science(folder, {"1": problem})
    (record,) = load("scienceqa", path=path, prompt_format=prompt_format, **options)
    assert record.meta["raw_prompt"]
    return record.question, record.reference


Q, C, M = "Question: Which is red?\n", "Context: Look.\n", "Options: (A) apple (B) sky (C) sea\n"
BOTH, ANSWER = f"{LECTURE} Apples are red.", "The answer is A."


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("QCM-A", Q + C + M, ANSWER),
        ("CQM-A", C + Q + M, ANSWER),
        ("QCM-ALE", Q + C + M, f"{ANSWER} BECAUSE: {BOTH}"),
        ("CQM-AL", C + Q + M, f"{ANSWER} BECAUSE: {LECTURE}"),
        ("QCM-AE", Q + C + M, f"{ANSWER} BECAUSE: Apples are red."),
        ("QCM-LA", Q + C + M, f"{LECTURE} {ANSWER}"),
        ("QCM-EA", Q + C + M, f"Apples are red. {ANSWER}"),
        ("QCM-LEA", Q + C + M, f"{BOTH} {ANSWER}"),
        ("QCM-ELA", Q + C + M, f"Apples are red. {LECTURE} {ANSWER}"),
        ("QCML-A", f"{Q}{C}{M}BECAUSE: {LECTURE}\n", ANSWER),
        ("QCME-A", f"{Q}{C}{M}BECAUSE: Apples are red.\n", ANSWER),
        ("QCMLE-A", f"{Q}{C}{M}BECAUSE: {BOTH}\n", ANSWER),
        ("QCLM-A", f"{Q}{C}BECAUSE: {LECTURE}\n{M}", ANSWER),
        ("QCEM-A", f"{Q}{C}BECAUSE: Apples are red.\n{M}", ANSWER),
        ("QCLEM-A", f"{Q}{C}BECAUSE: {BOTH}\n{M}", ANSWER),
        ("QCML-AE", f"{Q}{C}{M}BECAUSE: {LECTURE}\n", f"{ANSWER} BECAUSE: Apples are red."),
    ],
)
def test_scienceqa_prompts_are_those_of_the_reference(tmp_path: Path, name: str, prompt: str, answer: str) -> None:
    assert pair(tmp_path, PROBLEM, name) == (f"{prompt}Response:", answer)


def test_scienceqa_repeats_lavins_slips_only_when_asked(tmp_path: Path) -> None:
    assert pair(tmp_path, PROBLEM, "QCM-AL", compat="lavin")[1] == f"{ANSWER} BECAUSE: Apples are red."
    assert pair(tmp_path, PROBLEM, "QCM-AE", compat="lavin")[1] == f"{ANSWER} BECAUSE: {LECTURE}"
    bare = PROBLEM | {"lecture": "", "solution": "", "hint": ""}
    assert pair(tmp_path, bare, "QCM-ALE") == (f"{Q}Context: N/A\n{M}Response:", ANSWER)
    assert pair(tmp_path, bare, "QCM-ALE", compat="lavin")[1] == f"{ANSWER} BECAUSE:"
    assert pair(tmp_path, bare, "QCMLE-A")[0] == f"{Q}Context: N/A\n{M}Response:"
    assert pair(tmp_path, bare, "QCM-LEA")[1] == ANSWER


def test_scienceqa_adds_captions_to_the_context(tmp_path: Path) -> None:
    captions = write(tmp_path / "captions.json", {"captions": {"1": "a fruit"}})
    assert "Context: Look. a fruit\n" in pair(tmp_path, PROBLEM, "QCM-A", captions=captions)[0]
    assert "Context: a fruit\n" in pair(tmp_path, PROBLEM | {"hint": ""}, "QCM-A", captions=captions)[0]


def test_scienceqa_meta_and_images_serve_the_benchmarks_categories(tmp_path: Path) -> None:
    image = png(tmp_path / "images" / "train" / "1" / "image.png")
    problems = {
        "1": PROBLEM | {"image": "image.png"},
        "2": PROBLEM | {"hint": "", "answer": 2, "split": "val"},
    }
    path = science(tmp_path, problems, trainval=["1", "2"], val=["2"], minival=["2"])
    first, second = load("scienceqa", "trainval", path=path)
    assert first.images == (image,)
    assert second.images == ()
    assert first.meta["has_image"]
    assert not second.meta["has_image"]
    assert first.meta["has_hint"]
    assert not second.meta["has_hint"]
    assert second.meta["choices"][second.meta["answer"]] == "sea"
    assert (first.meta["subject"], first.meta["grade"]) == ("natural science", "grade3")
    assert load("scienceqa", "validation", path=path) == [second]
    assert load("scienceqa", "train", path=path, train="trainval", limit=1) == [first]
    assert load("scienceqa", "minival", path=path) == [second]


def test_scienceqa_reports_every_fault_and_unknown_names(tmp_path: Path) -> None:
    problems = {
        "1": PROBLEM | {"answer": 3},
        "2": PROBLEM | {"choices": ["a"] * 6},
        "3": PROBLEM | {"image": "image.png", "question": None},
    }
    path = science(tmp_path, problems, train=["1", "2", "3", "4"])
    faults = faults_of("scienceqa", path=path)
    assert faults[0].startswith("problem '4': listed in pid_splits.json, in problems.json found null")
    assert faults[1] == "problem '1': answer: expected the index of a choice (0 to 2), found 3"
    assert faults[2] == "problem '2': choices: expected 2 to 5 choices, found 6"
    assert faults[3] == "problem '3': question: expected text, found null"
    assert faults[4].startswith("problem '3': image: no image file")
    assert "no split 'trian'; it has train. Did you mean 'train'?" in faults_of("scienceqa", "trian", path=path)[0]
    with pytest.raises(OptionsError, match=r"no prompt_format 'QCM-ALEX'.*Did you mean 'QCM-ALE'"):
        load("scienceqa", path=path, prompt_format="QCM-ALEX")
    assert faults_of("scienceqa", path=tmp_path / "none") == ("no such file",)


# easyvqa


def test_easyvqa_uses_every_question_once_whatever_the_grouping() -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    asked = sorted(zip(*easy_vqa.get_test_questions(), strict=True))
    for options in ({}, {"questions_per_record": 4}, {"questions_per_record": 3, "shuffle": True}):
        found: list[tuple[str, str, int]] = []
        for record in load("easyvqa", "test", **options):
            turns = [message.text for message in record.messages]
            assert len(record.images) == 1
            assert len(turns) <= 2 * int(options.get("questions_per_record", 1))
            found += zip(turns[::2], turns[1::2], [record.meta["image"]] * len(turns), strict=False)
            image = record.images[0]
            assert isinstance(image, Path)
            assert image.stem == str(record.meta["image"])
        assert sorted(found) == asked


def test_easyvqa_is_deterministic_and_shuffles_by_seed() -> None:
    pytest.importorskip("easy_vqa")
    options = {"questions_per_record": 4, "shuffle": True, "limit": 50}
    first = load("easyvqa", "test", **options)
    assert len(first) == 50
    assert first == load("easyvqa", "test", **options)
    assert first != load("easyvqa", "test", **options, seed=1)
    assert len({record.id for record in load("easyvqa", "test")}) == 9673
    in_order = load("easyvqa", "test", limit=2)
    assert texts(in_order[0]) == [("user", "what is the red shape?"), ("assistant", "triangle")]


def test_easyvqa_refuses_other_splits_and_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lavintk.errors import PluginError

    pytest.importorskip("easy_vqa")
    assert "no split 'validation'; it has train and test" in faults_of("easyvqa", "validation")[0]
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(PluginError, match=r"pip install 'lavintk\[demo\]'"):
        load("easyvqa")


# jsonl


def test_jsonl_maps_fields_by_its_options(tmp_path: Path) -> None:
    image = png(tmp_path / "a.png")
    rows = (
        {"q": "What?", "a": "Red.", "pic": ["a.png"], "key": 3, "rules": "Be brief."},
        {"q": "Why?", "a": "So."},
    )
    names = {"prompt": "q", "answer": "a", "image": "pic", "id": "key", "system": "rules"}
    first, second = load("jsonl", path=write(tmp_path / "rows.jsonl", rows), **names)
    assert first == Record(
        "3",
        (Message("system", "Be brief."), Message("user", "What?"), Message("assistant", "Red.")),
        (image,),
    )
    assert texts(second) == [("user", "Why?"), ("assistant", "So.")]


def test_jsonl_without_answers_gives_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ({"prompt": "What?"},))
    assert load("jsonl", path=path, answer="")[0].reference == ""


def test_jsonl_refuses_a_mapping_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ({"prompt": "a", "answer": "b", "picture": "c.png"},))
    (fault,) = faults_of("jsonl", path=path, image="pictures")
    assert "no row has the field 'pictures' (option image)" in fault
    assert "fields: prompt, answer, picture. Did you mean 'picture'?" in fault
