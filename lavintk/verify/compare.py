"""The trained model and the exported one, asked the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavintk.answer import Answerer
from lavintk.data.batches import collate
from lavintk.data.labels import IGNORED, IMAGE
from lavintk.data.records import Message, Record
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError, ModelError, RunError
from lavintk.generate import generate_tokens
from lavintk.models.build import Assembly
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.run import Run, about_other_bases, evaluate
from lavintk.runtime import DESCRIPTION, ExportedModel
from lavintk.runtime import load as load_export
from lavintk.verify.distances import Figures, continuations, positions
from lavintk.verify.held_out import HeldOut, in_the_other_modality
from lavintk.verify.report import Bounds, Likeness, Scores, Verification

CHUNK = 64
"""Positions whose distributions are compared at a time: 128k words make 64 MB of float64."""
BATCH_SIZE = 8
FREE_TEXT = (
    "Please describe, in several long sentences, what a small town by the sea looks like early in the morning: the "
    "harbour and its boats, the light on the water, the people who are up already and what they do, the sounds and the "
    "smells, and how all of that changes when the first visitors arrive on a warm day in summer.",
    "Here is a list of things that were found in an old wooden box: a brass key, three letters tied with a blue "
    "ribbon, a pocket watch that has stopped at ten past four, and a photograph of a house on a hill. Tell the story "
    "of how they came there, who they belonged to, and who found them, from the beginning to the end.",
)
"""Prompts that invite long answers, where small differences add up."""


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
    say: Callable[[str], None] | None = None,
) -> Verification:
    """Compare the folder with the loaded model of ``run``.

    :param records: to compare on, drawn with a fixed seed.
    :param data: by default the run's test data, else its validation data, else the last of its training data.
    :param split: of ``data``; by default that of the recipe.
    :param tokens: longest greedy answer, and length of the greedy texts that no end token stops.
    :param accuracy: questions that both answer in the recipe's evaluation; 0 for none.
    :param threads: onnxruntime's, as in :func:`lavintk.runtime.load`.
    :param say: told what is being done, a few words at a time.
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
    source = HeldOut.of(run, data, split)
    drawn = source.draw(records)
    return _Comparison(run.assembly, exported, tokens, list(source.notes), say or (lambda words: None)).run(
        run, source, drawn, quant, accuracy=accuracy, started=started
    )


def _check_base(run: Run, folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse a folder that was made from other frozen models than those of the run.

    :raises RunError: with both hashes of each that differs.
    """
    faults = about_other_bases(run.assembly.base, content.get("base") or {}, "the run has", "the folder has")
    if faults:
        raise RunError(
            "\n".join([f"{folder} was not made from {run.folder}: the base weights are others.", *faults])
            + f"\nName the run that it was made from, or export {run.folder} anew with `lavintk export`."
        )


class _Comparison:
    """The trained model beside the exported one."""

    def __init__(
        self, assembly: Assembly, exported: ExportedModel, tokens: int, notes: list[str], say: Callable[[str], None]
    ) -> None:
        self.assembly, self.exported, self.tokens, self.notes, self.say = assembly, exported, tokens, notes, say
        self.trained = Answerer(assembly, BATCH_SIZE)
        limits = [self.trained.context_length, exported.context_length]
        self.context = min([limit for limit in limits if limit is not None], default=2**31)
        if assembly.model.manner.decode_shift:
            notes.append(
                "the run imitates LaVIN's generator, whose positions are off by one while it answers; the folder "
                "counts them right, so greedy answers may differ"
            )

    def run(
        self, run: Run, source: HeldOut, drawn: list[Record], quant: Mapping[str, Any], *, accuracy: int,
        started: float,
    ) -> Verification:  # fmt: skip
        """Take all figures."""
        if self.exported.manifest.vision is not None:
            probes, note = in_the_other_modality(drawn)
            drawn += probes
            self.notes += [note] if note else []
        kept, rows = self._rows(drawn, run.recipe.data.max_length, run.recipe.data.too_long == "truncate")
        prompts = sum(self._same_tokens(record) for record in kept) / len(kept)
        whole, parts = self.likeness(rows)
        self.say(f"greedy answers to {len(kept)} prompts")
        ours, theirs = self._answers(kept)
        free = self._free_text()
        self.say(f"{len(free)} greedy texts of {self.tokens} tokens")
        timed = [self._unstopped(record) for record in free]
        free_ours, free_theirs = ([pair[side].ids for pair in timed] for side in (0, 1))
        speeds = [_rate([pair[side] for pair in timed]) for side in (0, 1)]
        files = sorted(path for path in self.exported.manifest.folder.rglob("*") if path.is_file())
        folder = self.exported.manifest.folder
        self.say("the folder's answers once more, read at once" if not accuracy else f"{accuracy} questions")
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
        whole, parts = Figures(), dict[str, Figures]()
        for number, row in enumerate(rows, 1):
            self.say(f"distributions of row {number} of {len(rows)}")
            part = parts.setdefault("image" if row.condition == IMAGE else "text", Figures())
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
            found.append(positions(ours, theirs, labels.cpu()))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _answers(self, records: Sequence[Record]) -> tuple[list[list[int]], list[list[int]]]:
        """Return both models' greedy ids, up to where the shorter context ends."""
        room = [self.context - len(self.assembly.template.prompt(record)) + 1 for record in records]
        ours, theirs = (
            model.answer_ids(records, max_new_tokens=self.tokens) for model in (self.trained, self.exported)
        )
        return [ids[:n] for ids, n in zip(ours, room)], [ids[:n] for ids, n in zip(theirs, room)]

    def _unstopped(self, record: Record) -> tuple[_Timed, _Timed]:
        """Return both models' greedy text of :attr:`tokens` tokens: an end token is one like any other."""
        row = self.assembly.template.prompt(record)
        batch = collate([row], self.assembly.images).to(self.assembly.model.device)
        steps = generate_tokens(self.assembly.model, batch, max_new_tokens=self.tokens, stop=frozenset())
        return _timed(steps), _timed(self.exported.steps([row], self.tokens))

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

    def _scores(self, run: Run, source: HeldOut, count: int) -> Scores:
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


@dataclass(frozen=True)
class _Timed:
    """A decoded text.

    :param seconds: from the first token to the last.
    """

    ids: list[int]
    seconds: float


def _timed(steps: Iterator[list[int | None]]) -> _Timed:
    """Decode one row."""
    first = next(steps)
    started = time.perf_counter()
    ids = [token for step in (first, *steps) for token in step if token is not None]
    return _Timed(ids, time.perf_counter() - started)


def _rate(texts: Sequence[_Timed]) -> float | None:
    """Return tokens per second behind the first one; None where there are none."""
    count = sum(len(text.ids) - 1 for text in texts)
    return count / sum(text.seconds for text in texts) if count else None
