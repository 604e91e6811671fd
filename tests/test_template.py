"""Templates and tokens: which token is trained, where images go, and what generation is given."""

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from lavintk.data.batch import IGNORED, IMAGE, TEXT
from lavintk.data.preview import render_preview
from lavintk.data.records import Message, Record
from lavintk.data.template import Template, make_template
from lavintk.data.tokenize import TokenizedRecord, TokenReport, tokenize_all
from lavintk.errors import DataError, ModelError

LINES = [
    "what is the red shape? yes no",
    "Instruction: is it a circle?\nResponse: yes",
    "assistant: yes no maybe",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(chat_template: str | None = CHATML, special: list[Any] | None = None, **kept: Any) -> Any:
    """Return a byte-level BPE tokenizer like GPT-2's, its offsets trimmed as GPT-2's are."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(LINES * 5, trainer)
    if special:
        backend.add_special_tokens(special)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, eos_token="<|im_end|>", **kept)
    tokenizer.chat_template = chat_template
    return tokenizer


def llama_like(chat_template: str | None = None) -> Any:
    """Return a word-level tokenizer that puts a BOS in front, as LLaMA's does."""
    words = [
        "Image:",
        "N/A",
        "Instruction:",
        "What",
        "colour",
        "Is",
        "it",
        "Response:",
        "red",
        "blue",
        "Q",
        "A",
    ]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("Response:", "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


def record(*texts: str, images: int = 0, system: str = "", name: str = "r", **meta: Any) -> Record:
    """Return a conversation in which user and assistant take turns."""
    messages = [Message("user" if place % 2 == 0 else "assistant", text) for place, text in enumerate(texts)]
    if system:
        messages.insert(0, Message("system", system))
    return Record(name, tuple(messages), tuple(Path(f"{i}.png") for i in range(images)), meta)


def trained_ids(row: TokenizedRecord) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def trained_text(tokenizer: Any, row: TokenizedRecord) -> str:
    return str(tokenizer.decode(trained_ids(row), skip_special_tokens=False))


def assert_labels_are_shifted(row: TokenizedRecord) -> None:
    assert len(row.labels) == len(row.input_ids)
    assert row.labels[-1] == IGNORED
    pairs = zip(row.labels[:-1], row.input_ids[1:], strict=True)
    assert all(label in (IGNORED, following) for label, following in pairs)
    assert row.trained == len(trained_ids(row))


def assert_prompt_is_the_training_prefix(template: Template, of: Record) -> None:
    row, prompt = template.tokenize_record(of), template.prompt(of)
    assert prompt.input_ids == template.prompt_ids(of)
    assert row.input_ids[: len(prompt)] == prompt.input_ids
    assert row.visual_slots[: len(prompt.visual_slots)] == prompt.visual_slots
    assert row.labels[len(prompt) - 1] != IGNORED, "the first token of the answer is trained"
    assert trained_ids(prompt) == []


# chat templates


def test_trained_tokens_are_those_of_transformers_generation_mask_for_random_conversations() -> None:
    tokenizer = byte_level()
    template = make_template(tokenizer)
    pieces = [
        "yes",
        " no",
        "\n",
        "what  is",
        "é",
        "日本",
        "🙂",
        "<b>",
        "assistant",
        "user\n",
        "end",
        "im_end",
        ": ",
    ]
    dice = random.Random(0)
    for _ in range(60):
        texts = ["".join(dice.choices(pieces, k=dice.randint(1, 6))) for _ in range(2 * dice.randint(1, 4))]
        texts = [text.strip() or "x" for text in texts]
        conversation = record(*texts, system=dice.choice(["", "Be brief."]))
        row = template.tokenize_record(conversation)
        messages = [{"role": m.role, "content": m.text} for m in conversation.messages]
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert row.input_ids == expected["input_ids"]
        shifted = [*expected["assistant_masks"][1:], 0]
        assert [int(label != IGNORED) for label in row.labels] == shifted
        assert (row.straddling, row.last_turn_only, row.condition) == (0, False, TEXT)
        assert_labels_are_shifted(row)
        assert_prompt_is_the_training_prefix(template, conversation)


def test_an_answer_is_trained_with_its_end_of_turn_but_without_the_newline_behind() -> None:
    tokenizer = byte_level()
    row = make_template(tokenizer).tokenize_record(record("what?", "yes", "and?", "no"))
    assert trained_text(tokenizer, row) == "yes<|im_end|>no<|im_end|>"


def test_messages_behind_the_last_answer_are_left_out() -> None:
    template = make_template(byte_level())
    open_ended = template.tokenize_record(record("a", "b", "c"))
    assert open_ended.input_ids == template.tokenize_record(record("a", "b")).input_ids
    assert template.prompt(record("a", "b", "c")).labels.count(IGNORED) == len(template.prompt(record("a", "b", "c")))


def test_a_token_across_the_start_of_an_answer_is_not_trained_and_counted() -> None:
    template_text = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_level(template_text)
    assert "Ġyes" in tokenizer.get_vocab()
    rows, report = tokenize_all([record("what", "yes no")], make_template(tokenizer), 99)
    assert trained_text(tokenizer, rows[0]) == " no<|im_end|>"
    assert rows[0].straddling == 1
    assert report.straddled == 1
    assert_labels_are_shifted(rows[0])


def test_a_special_token_that_swallows_white_space_is_still_trained() -> None:
    tokenizer = byte_level(special=[AddedToken("<|stop|>", rstrip=True, special=True)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|stop|>")
    template = make_template(tokenizer)
    row = template.tokenize_record(record("what?", "yes", "and?", "no"))
    assert trained_text(tokenizer, row) == "yes<|stop|>no<|stop|>"
    assert row.straddling == 0
    assert template.stop_ids == (
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|stop|>"),
    )


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("normalizing", [True, False])
def test_llama2s_template_and_word_boundaries_are_followed(normalizing: bool) -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(["[INST] what is red [/INST] yes it is so no it"] * 5, trainer)
    if normalizing:  # as converted from SentencePiece: the same merges, no pre-tokenizer
        backend.pre_tokenizer = None
        spaces = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2
    template = make_template(tokenizer)
    conversation = record("what is red", "yes it is", "so", "no it")
    row = template.tokenize_record(conversation)
    text = "<s>[INST] what is red [/INST] yes it is </s><s>[INST] so [/INST] no it </s>"
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.input_ids.count(tokenizer.bos_token_id) == 2, "one for each turn, as the template has it"
    answers = [tokenizer.convert_ids_to_tokens(id) for id in trained_ids(row)]
    assert "".join(answers).replace("▁", " ") == " yes it is </s> no it </s>"
    assert row.straddling == 0
    assert_prompt_is_the_training_prefix(template, conversation)


def test_a_template_that_rewrites_history_trains_only_the_last_answer_and_counts_it() -> None:
    tokenizer = byte_level(REWRITING)
    template = make_template(tokenizer)
    long, short = record("a?", "one", "b?", "two", name="long"), record("a?", "one", name="short")
    rows, report = tokenize_all([long, short], template, 200)
    assert trained_text(tokenizer, rows[0]) == "<think></think>two<|im_end|>"
    assert trained_text(tokenizer, rows[1]) == "<think></think>one<|im_end|>"
    assert [row.last_turn_only for row in rows] == [True, False]
    assert report.last_turn_only == 1
    for conversation in (long, short):
        assert_prompt_is_the_training_prefix(template, conversation)
    # the answer's own text may occur in what the template puts in front of it
    row = template.tokenize_record(record("a?", "think"))
    assert trained_text(tokenizer, row) == "<think></think>think<|im_end|>"


def test_an_answer_follows_the_generation_prompt_even_if_the_template_renders_it_otherwise() -> None:
    tokenizer = byte_level(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    template = make_template(tokenizer)
    conversation = record("a?", "one", "b?", "two")
    row = template.tokenize_record(conversation)
    assert trained_text(tokenizer, row) == "two<|im_end|>"
    assert str(tokenizer.decode(row.input_ids)).endswith("<|im_start|>assistant\n<think>\ntwo<|im_end|>")
    assert_prompt_is_the_training_prefix(template, conversation)


def test_a_template_without_end_of_turn_gets_eos_behind_the_last_answer() -> None:
    tokenizer = byte_level(
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    template = make_template(tokenizer)
    row = template.tokenize_record(record("a?", "yes", "b?", "no"))
    assert trained_text(tokenizer, row) == "yesno<|im_end|>"
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_templates_that_trim_the_answer_are_followed() -> None:
    tokenizer = byte_level(
        CHATML.replace("{{ m['content'] }}<|im_end|>{% end", "{{ m['content'] | trim }}<|im_end|>{% end")
    )
    row = make_template(tokenizer).tokenize_record(record("a?", "  yes\n"))
    assert trained_text(tokenizer, row) == "yes<|im_end|>"


def test_a_chat_template_file_and_a_system_message_are_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML.replace("<|im_start|>", "<|im_start|>#"))
    tokenizer = byte_level(chat_template=None)
    template = make_template(tokenizer, str(path), "Be brief.")
    assert template.kind == str(path)
    shown = str(tokenizer.decode(template.prompt_ids(record("a?"))))
    turns = ("system\nBe brief.<|im_end|>\n", "user\na?<|im_end|>\n", "assistant\n")
    assert shown == "".join(f"<|im_start|>#{turn}" for turn in turns)
    own = str(tokenizer.decode(template.prompt_ids(record("a?", system="Be long."))))
    assert "Be long." in own
    assert "Be brief." not in own


def test_unusable_templates_and_tokenizers_are_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no template 'lavni'.*Did you mean 'lavin'"):
        make_template(byte_level(), "lavni")
    with pytest.raises(ModelError, match="has no chat template"):
        make_template(byte_level(None), "chat")
    with pytest.raises(ModelError, match="the chat template fails"):
        make_template(byte_level("{% for m in %}"))
    with pytest.raises(ModelError, match="leaves the assistant's text out"):
        make_template(byte_level("nothing"))
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(ModelError, match=r"no system role\. Leave the system message out"):
        make_template(byte_level(no_system + CHATML), system="Be brief.")
    with pytest.raises(ModelError, match="leaves the system message out"):
        make_template(byte_level(CHATML.replace("messages %}", "messages if m['role'] != 'system' %}")), system="Be")
    slow: Any = SimpleNamespace(chat_template=None, eos_token_id=2)
    with pytest.raises(ModelError, match="gives no character offsets"):
        make_template(slow)


def test_conversations_that_a_template_refuses_are_listed_together() -> None:
    template = make_template(
        byte_level("{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHATML)
    )
    good, bad = record("a", "b"), [record("a", "b", "c", "d", name=name) for name in "xy"]
    with pytest.raises(DataError) as caught:
        tokenize_all([bad[0], good, bad[1]], template, 99)
    assert caught.value.faults == (
        "record 'x': the chat template fails: too many",
        "record 'y': the chat template fails: too many",
    )


# the beginning of sequence


@pytest.mark.parametrize("text", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("kind", ["chat", "plain", "lavin"])
def test_there_is_exactly_one_bos_if_the_tokenizer_wants_one(kind: str, text: str) -> None:
    turn = "{{ 'Q ' if m['role'] == 'user' else 'A ' }}{{ m['content'] }} </s> "
    chat = f"{text}{{% for m in messages %}}{turn}{{% endfor %}}"
    template = make_template(llama_like(chat), kind, visual_tokens=2)
    for conversation in (record("What colour", "red", "Is it", "blue"), record("What", "red", images=1)):
        row = template.tokenize_record(conversation)
        assert row.input_ids[0] == 1
        assert row.input_ids.count(1) == 1


def test_there_is_no_bos_if_the_tokenizer_wants_none() -> None:
    tokenizer = byte_level(bos_token="<|endoftext|>")
    for kind in ("chat", "plain", "lavin"):
        assert tokenizer.bos_token_id not in make_template(tokenizer, kind).prompt_ids(record("a?", "b"))


# LaVIN's form


def ids_of(tokenizer: Any, words: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(word)) for word in words.split()]


def test_lavin_rows_have_the_layout_of_the_original() -> None:
    tokenizer = llama_like()
    template = make_template(tokenizer, "lavin", visual_tokens=6)
    turn = ids_of(tokenizer, "Instruction: What colour Response: red </s>")

    row = template.tokenize_record(record("What colour", "red", images=1))
    assert row.input_ids == [1, *ids_of(tokenizer, "Image:"), *[0] * 6, *turn]
    assert row.visual_slots == [2, 3, 4, 5, 6, 7]
    assert row.condition == IMAGE
    assert trained_ids(row) == ids_of(tokenizer, "red </s>")

    row = template.tokenize_record(record("What colour", "red"))
    assert row.input_ids == [1, *ids_of(tokenizer, "Image: N/A"), *turn]
    assert (row.visual_slots, row.condition) == ([], TEXT)
    assert_labels_are_shifted(row)


def test_prompts_that_are_complete_are_not_wrapped_again() -> None:
    tokenizer = llama_like()
    template = make_template(tokenizer, "lavin")
    row = template.tokenize_record(record("What Response:", "red", raw_prompt=True))
    assert row.input_ids == [1, *ids_of(tokenizer, "Image: N/A What Response: red </s>")]
    plain = make_template(tokenizer, "plain").tokenize_record(record("What Response:", "red", raw_prompt=True))
    assert plain.input_ids == [1, *ids_of(tokenizer, "What Response: red </s>")]


def test_without_a_chat_template_auto_is_instruction_and_response_turn_after_turn() -> None:
    tokenizer = byte_level(chat_template=None)
    template = make_template(tokenizer)
    assert template.kind == "plain"
    row = template.tokenize_record(record("a?", "yes", "b?", "no", system="Be brief."))
    assert str(tokenizer.decode(row.input_ids)) == (
        "Be brief.\nInstruction: a?\nResponse:yes<|im_end|>Instruction: b?\nResponse:no<|im_end|>"
    )
    assert trained_text(tokenizer, row) == "yes<|im_end|>no<|im_end|>"
    with pytest.raises(DataError, match="must take turns"):
        template.tokenize_record(Record("r", (Message("assistant", "b"), Message("user", "a"))))


# images


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("what?", "#\nwhat?"),
        ("<image>what?", "#\nwhat?"),
        ("<image>\nwhat?", "#\nwhat?"),
        ("what?\n<image>", "what?\n#"),
        ("is <image> red?", "is #\n red?"),
    ],
)
def test_slots_stand_where_the_marker_stands(question: str, shown: str) -> None:
    tokenizer = byte_level()
    row = make_template(tokenizer, visual_tokens=3).tokenize_record(record(question, "yes", images=1))
    before, after = row.input_ids[: row.visual_slots[0]], row.input_ids[row.visual_slots[-1] + 1 :]
    assert row.visual_slots == list(range(len(before), len(before) + 3))
    text = f"{tokenizer.decode(before)}#{tokenizer.decode(after)}"
    assert text == f"<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert trained_text(tokenizer, row) == "yes<|im_end|>"
    assert row.condition == IMAGE


def test_text_around_images_is_added_once() -> None:
    tokenizer = byte_level()
    template = make_template(tokenizer, visual_tokens=1, image_prefix="[", image_suffix="]")
    for question in ("what?", "<image>what?", "[<image>]what?"):
        row = template.tokenize_record(record(question, "yes", images=1))
        row.input_ids[row.visual_slots[0] : row.visual_slots[0] + 1] = tokenizer.encode("#")
        assert "user\n[#]what?<|im_end|>" in str(tokenizer.decode(row.input_ids))


@pytest.mark.parametrize("kind", ["chat", "plain", "lavin"])
def test_the_prompt_is_the_training_prefix_with_images_and_several_turns(kind: str) -> None:
    template = make_template(byte_level(), kind, visual_tokens=4)
    for conversation in (
        record("what?", "yes", images=1),
        record("<image>\nwhat?", "yes", "and <image>?", "no", images=2),
        record("what?", "yes", "b?", "no", system="Be brief.", images=2),
        record("what?", "yes"),
    ):
        assert_prompt_is_the_training_prefix(template, conversation)
        row = template.tokenize_record(conversation)
        assert len(row.visual_slots) == 4 * len(conversation.images)
        assert_labels_are_shifted(row)


def test_lavin_takes_the_markers_out_of_the_text() -> None:
    template = make_template(llama_like(), "lavin", visual_tokens=2)
    expected = template.tokenize_record(record("What colour", "red", images=1))
    for question in ("<image>\nWhat colour", "What colour\n<image>", "<image>What colour"):
        assert template.tokenize_record(record(question, "red", images=1)) == expected


def test_markers_that_do_not_fit_the_images_are_listed() -> None:
    template = make_template(byte_level(), visual_tokens=2)
    wrong = [
        record("<image> what?", "yes", name="none"),
        record("<image><image>", "yes", images=1, name="many"),
        record("what?", "see <image>", images=1, name="answer"),
        Record("silent", (Message("assistant", "yes"),)),
    ]
    with pytest.raises(DataError) as caught:
        tokenize_all(wrong, template, 99)
    assert caught.value.faults == (
        "record 'none': 1 markers <image> in the text, 0 images",
        "record 'many': 2 markers <image> in the text, 1 images",
        "record 'answer': the marker <image> stands outside a user message",
        "record 'silent': it has no user message",
    )
    with pytest.raises(DataError, match="it has an image, but the model takes none"):
        make_template(byte_level()).tokenize_record(record("what?", "yes", images=1))
    twice = make_template(
        byte_level(CHATML.replace("{{ m['content'] }}<|im_end|>\n", "{{ m['content'] * 2 }}\n")),
        visual_tokens=1,
    )
    with pytest.raises(DataError, match="shows 2 of 1 images"):
        twice.tokenize_record(record("what?", "yes", images=1))


# all records


def lengths_record(words: int, name: str) -> Record:
    return record("What " * words, "red " * 3, name=name)


def test_rows_too_long_are_left_out_and_named_by_default() -> None:
    template = make_template(llama_like(), "plain")
    records = [lengths_record(5, "short"), lengths_record(50, "long"), lengths_record(60, "longer")]
    rows, report = tokenize_all(records, template, 20)
    assert [row.id for row in rows] == ["short"]
    assert report.dropped == ("long", "longer")
    assert (report.rows, report.longest) == (1, 67)
    assert "2 rows left out, longer than 20 tokens (longest 67): long, longer" in printed(report)


def test_truncated_rows_are_cut_at_the_end_and_named() -> None:
    template = make_template(llama_like(), "plain")
    (whole,), _ = tokenize_all([lengths_record(5, "a")], template, 99)
    (cut,), report = tokenize_all([lengths_record(5, "a")], template, len(whole) - 2, "truncate")
    assert cut.input_ids == whole.input_ids[:-2]
    assert cut.labels == [*whole.labels[:-3], IGNORED]
    assert_labels_are_shifted(cut)
    assert report.truncated == ("a",)
    assert "1 row cut, longer than" in printed(report)


def test_truncation_never_hides_that_an_answer_or_an_image_is_lost() -> None:
    template = make_template(llama_like(), "plain", visual_tokens=30)
    good = record("What", "red", name="good")
    with pytest.raises(DataError) as caught:
        tokenize_all([lengths_record(50, "lost"), good], template, 20, "truncate")
    assert caught.value.faults == (
        "record 'lost': no trained token; its answer lies behind the 20 tokens that are kept",
    )
    with pytest.raises(DataError, match="record 'seen': cutting it to 20 tokens cuts its image off"):
        tokenize_all([record("What", "red", images=1, name="seen"), good], template, 20, "truncate")


def test_too_long_can_be_an_error_that_lists_all() -> None:
    template = make_template(llama_like(), "plain")
    with pytest.raises(DataError) as caught:
        tokenize_all([lengths_record(50, "a"), lengths_record(1, "b"), lengths_record(60, "c")], template, 20, "error")
    assert caught.value.faults == (
        "record 'a': 57 tokens, at most 20 are allowed",
        "record 'c': 67 tokens, at most 20 are allowed",
    )


def test_rows_without_trained_tokens_are_faults() -> None:
    template = make_template(llama_like(), "plain")
    with pytest.raises(DataError, match="labels all masked") as caught:
        tokenize_all([record("What", name="a"), record("What", name="b")], template, 99)
    assert caught.value.faults == ("record 'a': no trained token", "record 'b': no trained token")
    with pytest.raises(DataError) as caught:
        tokenize_all([record("What", name="a"), record("What", "red")], template, 99)
    assert caught.value.faults == ("record 'a': no trained token",)


def test_no_rows_at_all_is_an_error() -> None:
    template = make_template(llama_like(), "plain")
    with pytest.raises(DataError, match="there are no records"):
        tokenize_all([], template, 99)
    with pytest.raises(DataError, match=r"all 1 records are longer than 5 tokens \(longest: 57\)"):
        tokenize_all([lengths_record(50, "a")], template, 5)


def printed(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_report_counts_what_the_rows_hold() -> None:
    template = make_template(llama_like(), "plain", visual_tokens=2)
    rows, report = tokenize_all([record("What", "red", images=1), record("What", "red blue", name="s")], template, 99)
    assert [len(row) for row in rows] == [8, 7]
    assert (report.rows, report.images, report.tokens, report.trained) == (2, 1, 15, 5)
    assert report.lengths == (7, 7, 8, 8)
    assert report == TokenReport(2, 15, 5, 1, (7, 7, 8, 8), 8, max_length=99)
    assert "tokens 15, of them trained 5 (33.3%)" in printed(report)


# preview


def png(path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (40, 30)).save(path)
    return path


def preview(width: int = 100, **console: Any) -> Any:
    return Console(file=io.StringIO(), width=width, **console)


def test_the_preview_marks_trained_text_and_shows_image_sizes(tmp_path: Path) -> None:
    tokenizer = byte_level()
    conversation = Record("r", record("what [b]?", "yes é", "b?", "no").messages, (png(tmp_path / "a.png"),))
    rows, report = tokenize_all(
        [conversation, record("x", "y", name="other")], make_template(tokenizer, visual_tokens=2), 99
    )
    console = preview()
    render_preview(rows, tokenizer, 1, console, report)
    shown = console.file.getvalue()
    assert f"r · {len(rows[0])} tokens, {rows[0].trained} trained" in shown
    assert "[image 40 x 30, 2 tokens]" in shown
    assert "what [b]?" in shown
    assert "«yes é<|im_end|>»" in shown
    assert "«no<|im_end|>»" in shown
    assert "other" not in shown
    assert "rows" in shown


def test_the_preview_colours_trained_text_on_a_terminal(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows, _ = tokenize_all([record("what?", "yes")], make_template(tokenizer), 99)
    console = preview(force_terminal=True, color_system="standard")
    render_preview(rows, tokenizer, 5, console)
    assert "\x1b[1;32myes<|im_end|>\x1b[0m" in console.file.getvalue()
