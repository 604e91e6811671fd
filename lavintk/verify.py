"""Compares an exported folder with the trained model: distributions, greedy answers, scores, sizes and speed.

Both read the same rows of held-out records. What differs is then due to the export alone: another grid, merged
adapters, other kernels, or a fault.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lavintk.answer import Answerer
from lavintk.data.batches import collate
from lavintk.data.labels import IGNORED, IMAGE
from lavintk.data.records import IMAGE_MARKER, Message, Record
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError, ModelError, RunError
from lavintk.generate import generate_tokens
from lavintk.model_card import card, with_provenance
from lavintk.models.build import Assembly
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.run import Run, evaluate, load_records
from lavintk.runtime import DESCRIPTION, ExportedModel
from lavintk.runtime import load as load_export
from lavintk.scoring import evaluation_for

SEED = 0
"""Of the draw of records and of the picture that stands in for one."""
CHUNK = 64
"""Positions whose distributions are compared at a time: 128k words make 64 MB of float64."""
TIMED_TOKENS = 32
"""Most tokens that are decoded to see how long it takes."""
PROBES = 8
"""Records that are asked once more in the modality of which the data has none."""
BATCH_SIZE = 8
CACHE_AGREEMENT = 0.9
"""Least share of its own answers' tokens that a sound folder chooses again when it reads them at once. Where
activations are rounded too, near ties fall either way; a cache at fault loses most."""
FREE_TEXT = (
    "Please describe, in several long sentences, what a small town by the sea looks like early in the morning: the "
    "harbour and its boats, the light on the water, the people who are up already and what they do, the sounds and the "
    "smells, and how all of that changes when the first visitors arrive on a warm day in summer.",
    "Here is a list of things that were found in an old wooden box: a brass key, three letters tied with a blue "
    "ribbon, a pocket watch that has stopped at ten past four, and a photograph of a house on a hill. Tell the story "
    "of how they came there, who they belonged to, and who found them, from the beginning to the end.",
)
"""Prompts that invite long answers, where small differences add up."""


@dataclass(frozen=True)
class Bounds:
    """How far an export may be from the trained model.

    :param kl: most mean Kullback-Leibler divergence per token, in nats.
    :param top1: least share of positions with the same first choice.
    """

    kl: float
    top1: float

    @classmethod
    def of(cls, quant: Mapping[str, Any]) -> Bounds:
        """Return the bounds of a folder's grid.

        :param quant: of ``lavintk_export.json``: ``grid``, and ``copied``, whether it is the one trained on.
        :raises ModelError: the grid is unknown.
        """
        grid, copied = quant.get("grid"), bool(quant.get("copied"))
        if grid in ("fp32", "fp16"):
            return cls(kl=1e-4, top1=0.99)
        if grid == "int8" or (grid in ("int4", "nf4") and copied):
            return cls(kl=0.05, top1=0.9)
        if grid in ("int4", "nf4"):
            return cls(kl=0.5, top1=0.6)
        raise ModelError(f"no bounds are known for the grid {grid!r}, only for int4, int8, nf4, fp16 and fp32")


@dataclass(frozen=True)
class Likeness:
    """How near the exported distributions are to the trained ones, at all positions of some rows.

    :param divergence: mean Kullback-Leibler divergence of the exported distribution from the trained one, in nats.
    :param agreement: share of positions with the same first choice.
    :param difference: the largest of a logit.
    :param labelled: tokens that the perplexities are over; they are None without any.
    """

    rows: int
    positions: int
    divergence: float
    largest_divergence: float
    agreement: float
    difference: float
    labelled: int
    trained_perplexity: float | None
    exported_perplexity: float | None


@dataclass(frozen=True)
class Continuations:
    """How far greedy answers of both models run together.

    :param identical: share of answers that are the same to the last token.
    :param common_prefix: mean number of tokens before they part.
    :param tokens: mean length of the trained model's.
    """

    answers: int
    identical: float
    common_prefix: float
    tokens: float


@dataclass(frozen=True)
class Scores:
    """Both models' scores in the recipe's evaluation.

    :param same_answers: share of questions that both answer with the same text.
    """

    evaluation: str
    questions: int
    trained: Mapping[str, float]
    exported: Mapping[str, float]
    same_answers: float


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    :param data: where the records are from.
    :param quant: of the folder, as ``lavintk_export.json`` says.
    :param prompts: share of records that become the same tokens in the folder as in training.
    :param parts: likeness by modality, ``"text"`` and ``"image"``, where there are rows of it.
    :param answers: greedy answers to the records; ``free_text``: to :data:`FREE_TEXT`, None where no prompt fits.
    :param cache_agreement: share of tokens of its answers that the folder chooses again when it reads them at once.
    :param trained_tokens_per_second: decoded by torch, one row, from the first new token on.
    :param exported_tokens_per_second: decoded by onnxruntime, likewise; None where no free prompt fits.
    :param sizes: bytes of each file under ``onnx/``.
    """

    data: str
    quant: Mapping[str, Any]
    prompts: float
    whole: Likeness
    parts: Mapping[str, Likeness]
    answers: Continuations
    free_text: Continuations | None
    cache_agreement: float
    scores: Scores | None
    trained_tokens_per_second: float | None
    exported_tokens_per_second: float | None
    folder_bytes: int
    sizes: Mapping[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def faults(self, bound: Bounds | None = None) -> list[str]:
        """Return what is out of bounds, one sentence each.

        :param bound: by default those of the folder's grid.
        """
        bound = bound or Bounds.of(self.quant)
        found = []
        if self.prompts < 1:
            found.append(f"{1 - self.prompts:.1%} of the records become other tokens than in training")
        for name, part in self.parts.items():  # negated, so that NaN is a fault
            if not part.divergence <= bound.kl:
                found.append(f"{name}: the mean KL divergence is {part.divergence:.2g}, at most {bound.kl:g} is sound")
            if not part.agreement >= bound.top1:
                same = f"{part.agreement:.1%} of the first choices are the same"
                found.append(f"{name}: {same}, at least {bound.top1:.0%} is sound")
        if not self.cache_agreement >= CACHE_AGREEMENT:
            found.append(
                f"answering token by token, it chooses otherwise than reading at once: {self.cache_agreement:.1%} are "
                f"the same, at least {CACHE_AGREEMENT:.0%} is sound"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON takes them; what is not finite is None."""
        figures = _finite(asdict(self))
        assert isinstance(figures, dict)
        return figures

    def table(self, console: Console) -> None:
        """Print the figures."""
        shown = Table("", *self.parts, box=None, pad_edge=False)
        for column in shown.columns[1:]:
            column.justify = "right"
        for name, show in _ROWS.items():
            shown.add_row(name, *map(show, self.parts.values()))
        console.print(f"{self.data}, {self.whole.rows} rows", soft_wrap=True)
        console.print(shown)
        for line in self._lines():
            console.print(line, soft_wrap=True)

    def _lines(self) -> list[str]:
        lines = [f"same prompt tokens: {self.prompts:.1%} of the records"]
        for name, found in (("answers", self.answers), ("free text", self.free_text)):
            if found is not None:
                lines.append(
                    f"greedy {name}: {found.identical:.1%} of {found.answers} identical, together for "
                    f"{found.common_prefix:.1f} of {found.tokens:.1f} tokens"
                )
        lines.append(f"token by token as at once: {self.cache_agreement:.1%}")
        if self.scores is not None:
            both = ", ".join(
                f"{name} {score:.4g} trained, {self.scores.exported.get(name, math.nan):.4g} exported"
                for name, score in self.scores.trained.items()
                if name != "questions"
            )
            same = f"{self.scores.same_answers:.1%} of the answers are the same"
            lines.append(f"{self.scores.evaluation}, {self.scores.questions} questions: {both}; {same}")
        if self.trained_tokens_per_second is not None and self.exported_tokens_per_second is not None:
            lines.append(
                f"decoding one row: {self.trained_tokens_per_second:.1f} tokens/s trained, "
                f"{self.exported_tokens_per_second:.1f} exported"
            )
        return [*lines, f"folder: {self.folder_bytes / 1e6:,.1f} MB; took {self.seconds:.1f} s", *self.notes]


_ROWS = {
    "positions": lambda part: f"{part.positions:,}",
    "KL, mean": lambda part: f"{part.divergence:.2e}",
    "KL, max": lambda part: f"{part.largest_divergence:.2e}",
    "same first choice": lambda part: f"{part.agreement:.2%}",
    "largest logit difference": lambda part: f"{part.difference:.2e}",
    "perplexity, trained": lambda part: _number(part.trained_perplexity),
    "perplexity, exported": lambda part: _number(part.exported_perplexity),
}
"""Lines of the table, from a :class:`Likeness`."""


def verify(
    run: Run,
    folder: Path,
    *,
    records: int = 32,
    data: str | Choice | None = None,
    split: str | None = None,
    tokens: int = 64,
    accuracy: int = 0,
    threads: int | None = None,
) -> Verification:
    """Compare the folder with the loaded model of ``run``.

    :param records: to compare on, drawn with a fixed seed.
    :param data: by default the run's test data, else its validation data, else the last of its training data.
    :param split: of ``data``; by default that of the recipe.
    :param tokens: longest greedy answer.
    :param accuracy: questions that both answer in the recipe's evaluation; 0 for none.
    :param threads: onnxruntime's, as in :func:`lavintk.runtime.load`.
    :raises RunError: the folder was made from other base weights, a number is out of range, or there is no record.
    :raises ModelError: the folder cannot be run, or its vocabulary is another.
    :raises DataError: records cannot be used.
    """
    least = {"records": (records, 1), "tokens": (tokens, 1), "accuracy": (accuracy, 0)}
    if faults := [f"{name} must be at least {low}, got {value}" for name, (value, low) in least.items() if value < low]:
        raise RunError(f"cannot verify: {'; '.join(faults)}")
    started = time.monotonic()
    exported = load_export(folder, threads=threads, batch_size=BATCH_SIZE)
    quant = exported.manifest.content.get("quant")
    if not isinstance(quant, Mapping):
        raise ModelError(f"{folder / DESCRIPTION}: quant must be a mapping with grid and copied, found {quant!r}")
    Bounds.of(quant)  # an unknown grid shows before the work, not behind it
    _check_base(run, folder, exported.manifest.content)
    source = _HeldOut.of(run, data, split)
    drawn = source.draw(records)
    return _Comparison(run.assembly, exported, tokens, list(source.notes)).run(
        run, source, drawn, quant, accuracy=accuracy, started=started
    )


def record(folder: Path, verification: Verification, run: Run | None = None) -> None:
    """Write the figures into the folder's description, under ``report``, and its ``README.md`` anew.

    :param run: says more about the data and the licences of the base.
    :raises ModelError: there is no such description.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Export the run anew with `lavintk export`.") from error
    if run is not None:
        content = with_provenance(content, run)
    report = {**verification.as_json(), "faults": verification.faults()}
    content["report"] = {**(content.get("report") or {}), "verification": report}
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / "README.md", card(content))


def divergences(trained: Tensor, exported: Tensor) -> Tensor:
    """Return KL(trained || exported) of each position, in nats, from logits ``[N, vocabulary]``; float64 ``[N]``."""
    goal, found = trained.double().log_softmax(-1), exported.double().log_softmax(-1)
    return (goal.exp() * (goal - found)).sum(-1).clamp(min=0)


# Which records


@dataclass(frozen=True)
class _HeldOut:
    """Records to compare on.

    :param evaluation: that fits the data.
    :param trained_on: there are no others than those of the training: its last ones are taken.
    """

    choice: Choice
    split: str
    records: list[Record]
    evaluation: Choice
    trained_on: bool

    @classmethod
    def of(cls, run: Run, data: str | Choice | None, split: str | None) -> _HeldOut:
        recipe = run.recipe.data
        given = Choice.parse(data) if isinstance(data, str) else data
        if given is not None:
            choice, default = given, recipe.test_split
        elif recipe.test is not None:
            choice, default = recipe.test, recipe.test_split
        elif recipe.validation is not None:
            choice, default = recipe.validation, recipe.validation_split
        else:
            choice, default = recipe.train, recipe.split
        trained_on = given is None and recipe.test is None and recipe.validation is None
        found = load_records(choice, split or default)
        if not found:
            raise RunError(f"{choice} has no records in split {split or default!r} to compare on")
        evaluation = evaluation_for(given, default=run.recipe.evaluation.name)
        return cls(choice, split or default, found, evaluation, trained_on)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("the recipe names no held-out data: these records were trained on",) if self.trained_on else ()

    def draw(self, count: int) -> list[Record]:
        if self.trained_on:
            return self.records[-count:]
        return random.Random(f"{SEED}/verify").sample(self.records, min(count, len(self.records)))


def _check_base(run: Run, folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse a folder that was made from other frozen models than those of the run.

    :raises RunError: with both hashes of each that differs.
    """
    here, there = run.assembly.base, content.get("base") or {}
    nothing = {"sha256": "none", "source": "none"}
    faults = []
    for role in sorted({*here, *there}):
        ours, theirs = here.get(role, nothing), {**nothing, **there.get(role, nothing)}
        if ours["sha256"] != theirs["sha256"]:
            faults.append(
                f"  - {role}: the run has sha256 {ours['sha256']} ({ours['source']}),\n"
                f"    the folder sha256 {theirs['sha256']} ({theirs['source']})"
            )
    if faults:
        raise RunError(
            "\n".join([f"{folder} was not made from {run.folder}: the base weights are others.", *faults])
            + f"\nName the run that it was made from, or export {run.folder} anew with `lavintk export`."
        )


def _in_the_other_modality(records: Sequence[Record]) -> tuple[list[Record], str]:
    """Return some records without images where all have one, and with a random picture where none has; and a note."""
    pictured = sum(bool(record.images) for record in records)
    some = records[:PROBES]
    if pictured == len(records):
        note = f"all records have images: the first {len(some)} are read once more without"
        return [_without_images(record) for record in some], note
    if pictured == 0:
        note = f"no record has an image: the first {len(some)} are read once more with a random picture"
        picture = _random_picture()
        return [replace(record, id=f"{record.id}/picture", images=(picture,)) for record in some], note
    return [], ""


def _without_images(record: Record) -> Record:
    messages = tuple(replace(message, text=message.text.replace(IMAGE_MARKER, "")) for message in record.messages)
    return replace(record, id=f"{record.id}/text", messages=messages, images=())


def _random_picture(size: int = 64) -> bytes:
    """Return smooth random colours as PNG."""
    from PIL import Image

    small = np.random.default_rng(SEED).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


# Comparing


class _Comparison:
    """The trained model beside the exported one."""

    def __init__(self, assembly: Assembly, exported: ExportedModel, tokens: int, notes: list[str]) -> None:
        self.assembly, self.exported, self.tokens, self.notes = assembly, exported, tokens, notes
        self.trained = Answerer(assembly, BATCH_SIZE)
        limits = [self.trained.context_length, exported.context_length]
        self.context = min([limit for limit in limits if limit is not None], default=2**31)
        if assembly.model.manner.decode_shift:
            notes.append(
                "the run imitates LaVIN's generator, whose positions are off by one while it answers; the folder "
                "counts them right, so greedy answers may differ"
            )

    def run(
        self, run: Run, source: _HeldOut, drawn: list[Record], quant: Mapping[str, Any], *, accuracy: int,
        started: float,
    ) -> Verification:  # fmt: skip
        """Take all figures."""
        if self.exported.manifest.vision is not None:
            probes, note = _in_the_other_modality(drawn)
            drawn += probes
            self.notes += [note] if note else []
        kept, rows = self._rows(drawn, run.recipe.data.max_length, run.recipe.data.too_long == "truncate")
        prompts = sum(self._same_tokens(record) for record in kept) / len(kept)
        whole, parts = self.likeness(rows)
        ours, theirs = self._answers(kept)
        free = self._free_text()
        free_ours, free_theirs = self._answers(free)
        speeds = self._decode_speeds(free[0]) if free else (None, None)
        files = sorted(path for path in self.exported.manifest.folder.rglob("*") if path.is_file())
        folder = self.exported.manifest.folder
        return Verification(
            data=f"{source.choice}, split {source.split}",
            quant=dict(quant),
            prompts=prompts,
            whole=whole,
            parts=parts,
            answers=continuations(ours, theirs),
            free_text=continuations(free_ours, free_theirs) if free else None,
            cache_agreement=self._cache_agreement([*kept, *free], [*theirs, *free_theirs]),
            scores=self._scores(run, source, accuracy) if accuracy else None,
            trained_tokens_per_second=speeds[0],
            exported_tokens_per_second=speeds[1],
            folder_bytes=sum(path.stat().st_size for path in files),
            sizes={path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.parent != folder},
            seconds=time.monotonic() - started,
            notes=tuple(self.notes),
        )

    def _rows(
        self, records: Sequence[Record], max_length: int, truncate: bool
    ) -> tuple[list[Record], list[TokenizedRecord]]:
        """Return the records that fit and their training rows, cut as in training where the recipe says so."""
        limit = min(max_length, self.context)
        found = [(record, self.assembly.template.tokenize_record(record)) for record in records]
        too_long = sum(len(row) > limit for _, row in found)
        if truncate:
            found = [(record, row.cut(limit) if len(row) > limit else row) for record, row in found]
        else:
            found = [(record, row) for record, row in found if len(row) <= limit]
        # an answer begins behind the prompt, which is not cut
        found = [(record, row) for record, row in found if len(self.assembly.template.prompt(record)) <= self.context]
        if too_long:
            what = "cut" if truncate else "left out"
            self.notes.append(f"{too_long} of {len(records)} rows are longer than {limit} tokens and {what}")
        if not found:
            raise DataError("the data", [f"all {len(records)} records are longer than {limit} tokens"])
        return [record for record, _ in found], [row for _, row in found]

    def _same_tokens(self, record: Record) -> bool:
        """Whether the folder's tokenizer and template make the same row; visual slots hold any id."""
        pair = []
        for template in (self.assembly.template, self.exported.template):
            row = template.tokenize_record(record)
            slots = set(row.visual_slots)
            ids = [None if place in slots else token for place, token in enumerate(row.input_ids)]
            pair.append((ids, row.labels, row.visual_slots))
        return pair[0] == pair[1]

    def likeness(self, rows: Sequence[TokenizedRecord]) -> tuple[Likeness, dict[str, Likeness]]:
        """Return the likeness over all rows, and that of each modality."""
        whole, parts = _Figures(), dict[str, _Figures]()
        for row in rows:
            part = parts.setdefault("image" if row.condition == IMAGE else "text", _Figures())
            figures = self._compared(row)
            for sums in (whole, part):
                sums.add(figures)
        return whole.likeness(), {name: part.likeness() for name, part in sorted(parts.items())}

    @torch.no_grad()
    def _compared(self, row: TokenizedRecord) -> dict[str, Tensor]:
        """Return the figures of each position of a row."""
        model = self.assembly.model
        batch = collate([row], self.assembly.images).to(model.device)
        hidden = model.hidden(batch)
        exported = torch.from_numpy(self.exported.row_logits([row])[0])
        found: list[dict[str, Tensor]] = []
        for part, theirs, labels in zip(hidden.split(CHUNK), exported.split(CHUNK), batch.labels.split(CHUNK)):
            ours = model.logits(part).cpu()
            if ours.shape != theirs.shape:
                folder = self.exported.manifest.folder
                raise ModelError(
                    f"{folder} knows {theirs.shape[-1]} tokens, the run {ours.shape[-1]}: it was made from another run"
                )
            found.append(_positions(ours, theirs, labels.cpu()))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _answers(self, records: Sequence[Record]) -> tuple[list[list[int]], list[list[int]]]:
        """Return both models' greedy ids, up to where the shorter context ends."""
        room = [self.context - len(self.assembly.template.prompt(record)) + 1 for record in records]
        ours, theirs = (
            model.answer_ids(records, max_new_tokens=self.tokens) for model in (self.trained, self.exported)
        )
        return [ids[:n] for ids, n in zip(ours, room)], [ids[:n] for ids, n in zip(theirs, room)]

    def _free_text(self) -> list[Record]:
        """Return the free prompts, shortened until they fit into the context with their answers."""
        fitting = []
        for number, text in enumerate(FREE_TEXT, 1):
            words = text.split()
            while words:
                record = Record(f"free text {number}", (Message("user", " ".join(words)),))
                if len(self.assembly.template.prompt(record)) + self.tokens <= self.context:
                    fitting.append(record)
                    break
                words = words[: len(words) // 2]
        if len(fitting) < len(FREE_TEXT):
            missing = len(FREE_TEXT) - len(fitting)
            self.notes.append(f"{missing} of the free prompts do not fit into {self.context} tokens")
        return fitting

    def _decode_speeds(self, record: Record) -> tuple[float | None, float | None]:
        """Return tokens per second of torch and of the folder, of one row from the first new token on, unstopped."""
        count = min(self.tokens, TIMED_TOKENS)
        if count < 2:
            return None, None
        row = self.assembly.template.prompt(record)
        batch = collate([row], self.assembly.images).to(self.assembly.model.device)
        trained = generate_tokens(self.assembly.model, batch, max_new_tokens=count, stop=frozenset())
        return _rate(trained), _rate(self.exported.steps([row], count))

    def _cache_agreement(self, records: Sequence[Record], answers: Sequence[Sequence[int]]) -> float:
        """Return the share of the answers' tokens that the folder chooses again when it reads them at once."""
        same = total = 0
        for record, ids in zip(records, answers, strict=True):
            if not ids:
                continue
            prompt = self.exported.template.prompt(record)
            read = [*prompt.input_ids, *ids[:-1]]
            logits = self.exported.row_logits([replace(prompt, input_ids=read, labels=[IGNORED] * len(read))])[0]
            same += int((logits[len(prompt) - 1 :].argmax(-1) == np.array(ids)).sum())
            total += len(ids)
        return same / total if total else 1.0

    def _scores(self, run: Run, source: _HeldOut, count: int) -> Scores:
        """Let both answer ``count`` questions, in the order they are drawn."""
        asked = source.draw(count)
        longest = run.recipe.evaluation.max_new_tokens
        ours = evaluate(self.assembly, asked, source.evaluation, max_new_tokens=longest, batch_size=BATCH_SIZE)
        scorer = installed_plugins().evaluations.create(source.evaluation)
        theirs = scorer.evaluate(self.exported, asked, max_new_tokens=longest)
        pairs = list(zip(ours.predictions, theirs.predictions, strict=True))
        same = sum(one.answer == other.answer for one, other in pairs)
        return Scores(
            str(source.evaluation), len(asked), dict(ours.scores), dict(theirs.scores), same / max(1, len(pairs))
        )


def continuations(trained: Sequence[Sequence[int]], exported: Sequence[Sequence[int]]) -> Continuations:
    """Return how far answers, given as ids, run together."""
    prefixes = []
    for ours, theirs in zip(trained, exported, strict=True):
        parted = (place for place, (one, other) in enumerate(zip(ours, theirs)) if one != other)
        prefixes.append(next(parted, min(len(ours), len(theirs))))
    count = len(prefixes)
    identical = sum(list(ours) == list(theirs) for ours, theirs in zip(trained, exported))
    return Continuations(count, identical / count, sum(prefixes) / count, sum(map(len, trained)) / count)


def _rate(steps: Iterator[list[int | None]]) -> float:
    """Return steps per second behind the first one."""
    next(steps)
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    return count / (time.perf_counter() - started)


def _positions(ours: Tensor, theirs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return figures of each position; the losses are NaN where nothing is labelled."""
    ignored, chosen = labels == IGNORED, labels.clamp(min=0).unsqueeze(1)
    losses = {
        name: -logits.double().log_softmax(-1).gather(1, chosen).squeeze(1)
        for name, logits in (("ours", ours), ("theirs", theirs))
    }
    return {
        "divergence": divergences(ours, theirs),
        "same": ours.argmax(-1) == theirs.argmax(-1),
        "difference": (ours - theirs).abs().amax(-1),
        "labelled": ~ignored,
        **losses,
    }


class _Figures:
    """Gathers figures of positions, row by row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def add(self, figures: dict[str, Tensor]) -> None:
        self.rows.append(figures)

    def likeness(self) -> Likeness:
        """Return means and maxima; torch's are NaN where a figure is, Python's are not."""
        all_of = {name: torch.cat([row[name] for row in self.rows]) for name in self.rows[0]}
        labelled = all_of["labelled"]
        count = int(labelled.sum())
        ours, theirs = (float(all_of[name][labelled].mean().exp()) if count else None for name in ("ours", "theirs"))
        return Likeness(
            rows=len(self.rows),
            positions=len(labelled),
            divergence=float(all_of["divergence"].mean()),
            largest_divergence=float(all_of["divergence"].max()),
            agreement=float(all_of["same"].double().mean()),
            difference=float(all_of["difference"].max()),
            labelled=count,
            trained_perplexity=ours,
            exported_perplexity=theirs,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3f}"


def _finite(value: Any) -> Any:
    """Return ``value`` with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    """Write a file in one step."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
