"""What a comparison found: figures, bounds, the printed table, and what is written into the folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lavintk.errors import ModelError
from lavintk.model_card import card, with_provenance
from lavintk.runtime import DESCRIPTION

if TYPE_CHECKING:
    from rich.console import Console

    from lavintk.run import Run

FREE = "greedy free text, not stopped at end tokens"
CACHE_AGREEMENT = 0.9
"""Least share of its own answers' tokens that a sound folder chooses again when it reads them at once. Where
activations are rounded too, near ties fall either way; a cache at fault loses most."""


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

        What rounding to 4 bits may cost is three to five times what it does to the demo run and half again what it does
        to SmolLM2-135M; see the figures beside the bounds in docs/export.md.

        :param quant: of ``lavintk_export.json``: ``grid``; ``copied``, whether its codes are those trained on;
            ``calibrated``, whether it was rounded with training rows in mind; ``trained``, the training's quantizer.
        :raises ModelError: the grid is unknown.
        """
        grid, copied = quant.get("grid"), bool(quant.get("copied"))
        if grid in ("fp32", "fp16"):
            return cls(kl=1e-4, top1=0.99)
        if grid == "int8" or (grid in ("int4", "nf4") and copied):
            return cls(kl=0.05, top1=0.9)
        if grid == "int4" and quant.get("calibrated"):
            return cls(kl=0.1, top1=0.75)
        if grid == "int4" or (grid == "nf4" and str(quant.get("trained")).startswith("nf4")):
            return cls(kl=0.3, top1=0.65)
        if grid == "nf4":
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

    def __str__(self) -> str:
        return (
            f"{self.identical:.1%} of {self.answers} identical, together for {self.common_prefix:.1f} of "
            f"{self.tokens:.1f} tokens"
        )


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
    :param answers: greedy answers to the records.
    :param free_text: greedy texts behind :data:`~lavintk.verify.compare.FREE_TEXT` that no end token stops, so that
        all of the tokens asked for are compared; None where no prompt fits.
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

    def verdict(self) -> list[str]:
        """Return what counts, with the bounds of the folder's grid, in a few lines."""
        bound = Bounds.of(self.quant)
        within = "out of bounds" if self.faults() else "within bounds"
        divergence = ", ".join(f"{part.divergence:.1e} {name}" for name, part in self.parts.items())
        same = ", ".join(f"{part.agreement:.1%} {name}" for name, part in self.parts.items())
        lines = [
            f"{within}: KL {divergence} (at most {bound.kl:g}); the same first choice {same} (at least "
            f"{bound.top1:.0%}), at {self.whole.positions:,} positions of {self.whole.rows} rows",
            f"greedy answers: {self.answers}",
        ]
        lines += [] if self.free_text is None else [f"{FREE}: {self.free_text}"]
        return [*lines, *self.notes]

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
        lines.append(f"greedy answers: {self.answers}")
        if self.free_text is not None:
            lines.append(f"{FREE}: {self.free_text}")
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
