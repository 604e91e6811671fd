"""Answers in torch: sampling against a formula, stopping, batches, likelihoods, and a conversation in the terminal."""

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavintk.answer import Answerer
from lavintk.chat import Conversation
from lavintk.data.batches import collate
from lavintk.data.records import Message, Record
from lavintk.errors import DataError, ModelError, OptionsError
from lavintk.generate import Sampling, generate_tokens, make_sampler
from lavintk.models.build import Assembly
from lavintk.recipe import make_recipe
from lavintk.testing import Outcome
from lavintk.testing.runs import multimodal, recipe
from lavintk.training import train

RunCli = Callable[..., Outcome]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees images, after a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "seeing"
    train(make_recipe(multimodal(tiny_folder, max_steps=3)), folder)
    return folder


@pytest.fixture(scope="module")
def seeing(run_folder: Path) -> Assembly:
    from lavintk.run import load

    return load(run_folder).assembly


@pytest.fixture(scope="module")
def blind(tiny_folder: Path) -> Assembly:
    """A text model whose adapter, untrained, changes nothing."""
    from lavintk.models.build import build
    from lavintk.plugins import installed_plugins

    return build(make_recipe(recipe(tiny_folder)), installed_plugins(), CPU, torch.float32)


def asked(text: str, name: str = "q", *images: Path) -> Record:
    return Record(name, (Message("user", text),), images)


QUESTIONS = ["what color is it?", "is there a blue circle?", "red?", "what is the shape of this, and what color?"]


# Sampling


def kept_by_formula(logits: np.ndarray[Any, Any], temperature: float, top_k: int, top_p: float) -> np.ndarray[Any, Any]:
    """Return the probabilities, token by token, as the words say: top-k first, then the mass in front of each."""
    scaled = logits / temperature
    order = np.argsort(-scaled)
    allowed = order[: top_k or len(order)]
    weights = np.exp(scaled[allowed] - scaled.max())
    weights /= weights.sum()
    before = 0.0
    probabilities = np.zeros_like(logits)
    for token, weight in zip(allowed, weights, strict=True):
        if before <= top_p:
            probabilities[token] = weight
        before += weight
    normalised: np.ndarray[Any, Any] = probabilities / probabilities.sum()
    return normalised


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.75), (1.3, 4, 1.0), (2.0, 6, 0.5), (1.0, 1, 0.9)]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_formula(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    expected = kept_by_formula(logits, temperature, top_k, top_p)
    draw = make_sampler(Sampling(temperature, top_p, top_k, seed=3), CPU)
    count = 40_000
    drawn = draw(torch.tensor(logits).float().expand(count, -1))
    shares = np.bincount(drawn.numpy(), minlength=12) / count
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / count))


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_sampler(Sampling(), CPU)(logits), logits.argmax(-1))


def test_a_top_p_of_zero_still_leaves_the_likeliest_token() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_sampler(Sampling(1.0, top_p=0.0), CPU)(logits), logits.argmax(-1))


def test_settings_out_of_range_are_refused_together() -> None:
    with pytest.raises(OptionsError) as caught:
        Sampling(-1, 1.5, -2)
    assert len(caught.value.faults) == 3


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(blind: Assembly) -> None:
    answerer = Answerer(blind)

    def say(seed: int) -> str:
        sampling = Sampling(5.0, seed=seed)
        return "".join(answerer.stream(asked("red?"), max_new_tokens=20, sampling=sampling))

    assert say(1) == say(1)
    assert say(1) != say(2)


# Stopping, batches, pieces


def test_generation_stops_at_a_stop_id_and_yields_it(blind: Assembly) -> None:
    batch = collate([blind.template.prompt(asked(text)) for text in QUESTIONS], None)
    free = list(generate_tokens(blind.model, batch, max_new_tokens=12, stop=frozenset()))
    stop = free[3][0]
    assert stop is not None
    stopped = list(generate_tokens(blind.model, batch, max_new_tokens=12, stop=frozenset({stop})))
    for row in range(len(QUESTIONS)):
        without = [step[row] for step in free]
        end = without.index(stop) + 1 if stop in without else len(without)
        shown = [step[row] for step in stopped]
        assert shown[:end] == without[:end]
        assert all(token is None for token in shown[end:])
    assert len(stopped) == max([step[row] for step in free].index(stop) + 1 if stop in [s[row] for s in free] else 12
                               for row in range(len(QUESTIONS)))  # fmt: skip


def test_answers_in_a_batch_are_those_given_one_by_one(seeing: Assembly, tiny_folder: Path) -> None:
    records = [asked(text, str(i), *[tiny_folder / "1.png"] * (i % 2)) for i, text in enumerate(QUESTIONS)]
    together = Answerer(seeing, 4).answer(records, max_new_tokens=10)
    assert together == Answerer(seeing, 1).answer(records, max_new_tokens=10)
    assert any(together)


def test_streamed_pieces_make_up_the_answer(seeing: Assembly) -> None:
    answerer = Answerer(seeing)
    for text in QUESTIONS:
        pieces = list(answerer.stream(asked(text), max_new_tokens=16, sampling=Sampling()))
        assert "".join(pieces) == answerer.answer([asked(text)], max_new_tokens=16)[0]
        assert all(pieces)


def test_a_character_is_streamed_whole_and_half_of_one_only_at_the_limit(
    blind: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = blind.tokenizer("ab é", add_special_tokens=False)["input_ids"]
    answerer = Answerer(blind)

    def steps(batch: Any, max_new_tokens: int, sampling: Sampling) -> Iterator[list[int | None]]:
        yield from ([token] for token in ids[:max_new_tokens])

    monkeypatch.setattr(answerer, "_steps", steps)
    whole = list(answerer.stream(asked("x"), max_new_tokens=99, sampling=Sampling()))
    assert "".join(whole) == "ab é"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in whole)
    half = list(answerer.stream(asked("x"), max_new_tokens=len(ids) - 1, sampling=Sampling()))
    assert "".join(half) == "ab \N{REPLACEMENT CHARACTER}"


# Likelihoods


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_likelihoods_are_those_of_transformers_own_model(
    blind: Assembly, tiny_folder: Path, batch_size: int
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_folder / "llm").eval()
    completions = [["red", "is there a blue circle?"], ["yes", "no", "what"], ["a"]]
    history = (Message("user", "red?"), Message("assistant", "no"), Message("user", "blue?"))
    records = [
        asked("what color?"),
        replace(asked("yes or no?"), messages=(Message("user", "yes or no?"), Message("assistant", "unread"))),
        Record("h", history),
    ]
    found = Answerer(blind, batch_size).log_likelihoods(records, completions)
    assert [len(inner) for inner in found] == [2, 3, 1]
    for record, texts, likelihoods in zip(records, completions, found, strict=True):
        prompt = blind.template.prompt_ids(record)
        for text, likelihood in zip(texts, likelihoods, strict=True):
            own = blind.tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + own])).logits[0].double().log_softmax(-1)
            expected = sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(own))
            assert likelihood.tokens == len(own)
            assert likelihood.total == pytest.approx(expected, abs=1e-4)
            assert likelihood.mean == pytest.approx(expected / len(own), abs=1e-4)


def test_a_completion_without_a_token_is_refused(blind: Assembly) -> None:
    with pytest.raises(DataError, match="record 'q': the completion '' gives no token of its own"):
        Answerer(blind).log_likelihoods([asked("what?")], [["", "a"]])


# Conversations


def test_the_answer_to_a_later_question_is_that_to_the_whole_conversation(seeing: Assembly, tiny_folder: Path) -> None:
    conversation = Conversation(seeing, system="Be brief.", max_new_tokens=6)
    conversation.show(tiny_folder / "1.png")
    first = "".join(conversation.ask("what color?"))
    second = "".join(conversation.ask("is it red?"))
    messages = (
        Message("system", "Be brief."),
        Message("user", "<image>what color?"),
        Message("assistant", first),
        Message("user", "is it red?"),
    )
    whole = Record("r", messages, (tiny_folder / "1.png",))
    assert second == Answerer(seeing).answer([whole], max_new_tokens=6)[0]
    assert list(conversation.record.messages) == [*messages, Message("assistant", second)]
    conversation.reset()
    assert list(conversation.record.messages) == [messages[0]]
    assert not conversation.record.images
    assert (
        "".join(conversation.ask("hello"))
        == Answerer(seeing).answer([Record("r", (messages[0], Message("user", "hello")))], max_new_tokens=6)[0]
    )


def test_an_answer_that_is_given_up_is_remembered_as_far_as_it_went(seeing: Assembly) -> None:
    conversation = Conversation(seeing, max_new_tokens=30, sampling=Sampling(3.0))
    pieces = conversation.ask("what color?")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.record.messages[-1] == Message("assistant", first)


def test_a_question_that_cannot_be_answered_leaves_no_trace(blind: Assembly, tiny_folder: Path) -> None:
    conversation = Conversation(blind, max_new_tokens=4)
    with pytest.raises(DataError, match="marks the place of an image"):
        list(conversation.ask("what is <image>?"))
    with pytest.raises(ModelError, match=r"the conversation has \d+ tokens, the model reads at most \d+: start anew"):
        list(conversation.ask("why? " * 3000))
    with pytest.raises(ModelError, match="sees no images"):
        conversation.show(tiny_folder / "1.png")
    assert conversation.record.messages == ()


# In the terminal


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_terminal_answers_and_takes_commands(
    run_folder: Path, seeing: Assembly, tiny_folder: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tiny_folder / "2.png"
    typed(monkeypatch, "what color?", "/image none.png", f"/image {picture}", "/imagine", "", "red?", "/reset",
          "what color?", "/exit", "never read")  # fmt: skip
    settings = ["--temperature", "0", "--max-new-tokens", "5", "--device", "cpu"]
    outcome = run_cli("chat", str(run_folder), "--image", str(picture), *settings)
    assert outcome.exit_code == 0, outcome.stderr
    expected = Conversation(seeing, max_new_tokens=5)
    expected.show(picture)
    first = "".join(expected.ask("what color?"))
    expected.show(picture)
    second = "".join(expected.ask("red?"))
    expected.reset()
    third = "".join(expected.ask("what color?"))
    assert outcome.stdout == f"{first}\n{second}\n{third}\n"
    assert "no such image file" in outcome.stderr
    assert "no command /imagine" in outcome.stderr


def test_the_end_of_the_input_ends_the_conversation(
    run_folder: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "what color?")
    assert run_cli("chat", str(run_folder), "--max-new-tokens", "2").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--top-p", "2"], "top_p must lie between 0 and 1, got 2.0"),
        (["--image", "none.png"], "no such image file"),
        (["--device", "gpu"], "use auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_settings_are_refused_before_the_conversation(
    run_folder: Path, run_cli: RunCli, arguments: list[str], text: str
) -> None:
    outcome = run_cli("chat", str(run_folder), *arguments)
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert re.search(text, outcome.stderr)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    run_folder: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Answerer, record: Record, **_: Any) -> Iterator[str]:
        yield f"heard {len(record.messages)}"
        if len(record.messages) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "stream", interrupted)
    typed(monkeypatch, "one", "two")
    outcome = run_cli("chat", str(run_folder))
    assert outcome.stdout == "heard 1\nheard 3\n"
