"""What a plugin has to provide: small protocols with shapes, units and errors.

This module imports neither torch nor transformers, so a plugin can refer to it at no cost. Shapes: ``in`` and
``out`` are the features of a linear layer (``y = x @ W.T + b`` with ``W`` of shape ``[out, in]``), ``r`` the rank of
a low-rank update, ``N`` tokens laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from lavintk.data.records import Record
    from lavintk.layers import FrozenLinear
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run


class Quantizer(Protocol):
    """Turns weights of linear layers into modules that store them quantized and frozen."""

    requires_cuda: bool
    """Whether the modules compute only on a CUDA device."""

    def quantize(self, weight: torch.Tensor, bias: torch.Tensor | None) -> FrozenLinear:
        """Return a frozen layer that holds ``weight`` quantized, on the weight's device.

        :param weight: ``[out, in]``, fp32, fp16 or bf16; not kept.
        :param bias: ``[out]`` or None; kept in its own type.
        :raises LavintkError: the shape or the device is not supported.
        """
        ...

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> FrozenLinear:
        """Return a layer of that shape with undefined content, to load a ``state_dict`` into."""
        ...


@runtime_checkable
class CalibratedQuantizer(Protocol):
    """What a :class:`Quantizer` may offer besides: rounding that knows what goes into the layer."""

    def quantize_calibrated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, second_moment: torch.Tensor
    ) -> FrozenLinear:
        """Return a frozen layer on the grid of :meth:`Quantizer.quantize` whose outputs are near the weight's.

        No output's squared error on these inputs is larger than that of :meth:`Quantizer.quantize`.

        :param weight: ``[out, in]``, fp32, fp16 or bf16; not kept.
        :param bias: ``[out]`` or None; kept in its own type.
        :param second_moment: sum of ``x x'`` over inputs of the layer, fp32 ``[in, in]``, on the weight's device; not
            changed.
        :raises LavintkError: the shape or the device is not supported, or a value is not finite.
        """
        ...


class Optimizer(Protocol):
    """Builds a torch optimizer and says what it costs."""

    paged: bool
    """Whether the state lives in memory that moves between host and device by itself."""
    state_bits: int
    """Bits of one state value; AdamW keeps two values per parameter."""
    without_cuda: str
    """One sentence: what happens on a machine without CUDA; empty if nothing differs."""
    elementwise: bool
    """Whether each element is updated by itself, or in blocks of 256, wherever its parameter ends; then the optimizer
    may be given flat parameters (:mod:`lavintk.flat`). May be absent, which means no."""

    def build(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer over ``groups``.

        :param groups: dictionaries with ``params`` (a list of parameters) and ``weight_decay``.
        :param lr: peak learning rate; the schedule scales it from outside.
        :raises LavintkError: the optimizer cannot work on the parameters' device.
        """
        ...


@dataclass(frozen=True)
class AffineUpdate:
    """What an adapter adds to one linear layer under one condition: ``y += up @ (down @ x) + bias``. Exact.

    :param linear: name of the layer, a key of :meth:`MultimodalModel.linears`.
    :param condition: one of the adapter's ``conditions``.
    :param down: ``[r, in]``, fp32.
    :param up: ``[out, r]``, fp32.
    :param bias: ``[out]``, fp32, or None.
    """

    linear: str
    condition: str
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None


class Adapter(Protocol):
    """Adds trainable parameters to a frozen model."""

    conditions: tuple[str, ...]
    """What the adapter's effect depends on: ``("all",)``, or ``("text", "image")`` for LaVIN."""

    def attach(self, model: MultimodalModel) -> None:
        """Insert the adapter into ``model`` in place; at the start it must change no output. Called once.

        :raises ModelError: the model lacks what the adapter needs.
        """
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the trainable parameters; names are stable and unique."""
        ...

    def side_tokens(self) -> torch.Tensor | None:
        """Return ``[len(conditions), hidden]`` rows that go through the layers beside the tokens, or None.

        Each row attends to itself alone and no token attends to it: LaVIN's modality tokens.
        """
        ...

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter, and nothing else, into ``folder``, which may have to be made.

        :param base: name or path of the language model, for formats that record it.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote into the attached adapter.

        :raises CheckpointError: missing, unexpected or misshapen tensors, all of them listed.
        """
        ...

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        """Yield the exact update of each linear layer that the adapter changes, for each condition.

        They come layer by layer, all conditions of one linear layer together, so that who
        merges them need hold one layer at a time. Dropout is off. A down projection shared by several layers is
        yielded with each of them.

        :param prefix: only linear layers whose names begin with it, ``"language."`` or ``"vision."`` for example.
        :raises NotAffineError: what the adapter, as configured, does to the layers asked for has no affine form.
        """
        ...


@runtime_checkable
class ApproximateGradient(Protocol):
    """What an :class:`Adapter` may offer besides: to say that it is trained by another gradient than the loss's own."""

    inexact_gradient: str
    """One sentence: what is left out, for example that a norm counts as a constant; empty where nothing is."""


@runtime_checkable
class AdapterReader(Protocol):
    """What the options class of an adapter may offer besides: to know its adapter in another program's files."""

    def of_folder(self, folder: Path) -> Mapping[str, Any] | None:
        """Return the options with which :meth:`Adapter.load` reads ``folder``, or None if it is of another kind.

        A class method. No model is loaded yet.

        :raises CheckpointError: the files are of this kind, but damaged or another function; all faults listed.
        """
        ...


class Exporter(Protocol):
    """Writes a trained run in a format for other programs.

    A run may also be one that was only imported: then its recipe names no training data (``data.train``) and perhaps
    no adapter, and its manifest holds no facts of a training.
    """

    def export(self, run: Run, out: Path) -> None:
        """Write ``run`` into the new folder ``out``.

        :raises LavintkError: the run cannot be expressed in the format.
        """
        ...


@runtime_checkable
class SizedExporter(Protocol):
    """What an :class:`Exporter` may offer besides: how much room its folder takes."""

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        """Return the bytes of the weights to be written, not more than it will take.

        :param outline: the model of ``run`` on the meta device, its adapter attached: names and shapes.
        """
        ...


@runtime_checkable
class ComparedExporter(Protocol):
    """What an :class:`Exporter` may offer besides: to say that lavintk's own runtime runs its folders.

    They are compared with the model once they are written; what that takes is then asked for before the work begins.

    :ivar runs_here: true.
    """

    runs_here: bool


class DatasetFormat(Protocol):
    """Reads one record format. Made from its options, among them ``path`` where there is a file."""

    def load(self, split: str) -> list[Record]:
        """Return the records of ``split`` in file order.

        :param split: ``"train"``, ``"validation"`` or ``"test"``; formats without splits return all for any name.
        :raises DataError: every fault found, with file, line or record, and field.
        """
        ...


@dataclass(frozen=True)
class Questions:
    """Records to score given answers against.

    :param missing: ids that the split lists and the data lacks.
    """

    records: list[Record]
    missing: tuple[str, ...] = ()


@runtime_checkable
class QuestionSource(Protocol):
    """What a :class:`DatasetFormat` may offer besides: records for answers that exist already."""

    def questions(self, split: str) -> Questions:
        """Return the records that are there; no image is looked for, and the file may hold a part of the split.

        :raises DataError: every fault found in the records that are there, or there are none.
        """
        ...


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a text as the answer.

    :param total: log-likelihood of the answer's tokens in nats, without the end of turn behind it.
    :param tokens: how many tokens that is.
    """

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token, by which answers of different lengths can be compared."""
        return self.total / max(1, self.tokens)


class AnsweringModel(Protocol):
    """What an evaluation sees of a model."""

    def answer(self, records: Sequence[Record], *, max_new_tokens: int) -> list[str]:
        """Return one greedy answer to the last user message of each record, in order."""
        ...

    def log_likelihoods(
        self, records: Sequence[Record], completions: Sequence[Sequence[str]]
    ) -> list[list[Likelihood]]:
        """Return how likely each completion is as the start of the answer to the record, in order.

        :param completions: the candidates of each record; the record's own last answer is not looked at.
        :raises DataError: a candidate that gives no token of its own.
        """
        ...


@dataclass(frozen=True)
class Prediction:
    """One answered record."""

    record_id: str
    question: str
    answer: str
    reference: str
    correct: bool


@dataclass(frozen=True)
class EvaluationResult:
    """Scores by name, among them ``questions`` (their count), and what they rest on.

    :param details: figures of parts, for example of each category of questions; None where there is no figure.
    :param table: the scores as the terminal shows them, the head in the first row; empty: the scores are listed.
    :param notes: sentences to stand below, for example on what could not be scored.
    """

    scores: dict[str, float]
    predictions: list[Prediction] = field(default_factory=list)
    details: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    notes: tuple[str, ...] = ()


class Evaluation(Protocol):
    """Scores a model on records. May also be an :class:`AnswerScoring` or a :class:`FileScoring`."""

    def evaluate(self, model: AnsweringModel, records: Sequence[Record], *, max_new_tokens: int) -> EvaluationResult:
        """Return the scores of ``model`` on ``records``; the last assistant message is the reference.

        :raises DataError: a record lacks what the evaluation needs.
        """
        ...


@runtime_checkable
class AnswerScoring(Protocol):
    """An evaluation that also scores answers that exist already: ``lavintk eval --predictions FILE``."""

    def score(self, records: Sequence[Record], answers: Mapping[str, str | int]) -> EvaluationResult:
        """Return the scores of ``answers`` to ``records``.

        :param answers: for the id of each record a text, or the index of a choice.
        :raises DataError: a record lacks what the evaluation needs, or an answer is of the wrong kind.
        """
        ...


@runtime_checkable
class FileScoring(Protocol):
    """An evaluation whose answer files bring questions and references with them, so that no data is named."""

    def score_files(self, path: Path) -> EvaluationResult:
        """Return the scores of the answer files at ``path``.

        :raises DataError: every fault of the files.
        """
        ...


@dataclass(frozen=True)
class RunInfo:
    """What life-cycle hooks are told about a run."""

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    total_steps: int
    trainable_parameters: int


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step.

    :param loss: mean cross entropy per trained token over the accumulation window, in nats.
    :param gradient_norm: before clipping.
    :param tokens: tokens that went through the model, trained or not.
    :param memory_bytes: peak so far: device memory on CUDA, resident memory of the process otherwise.
    :param seconds_left: estimated time to the end of training.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    samples_per_second: float
    memory_bytes: int
    seconds_left: float

    def figures(self) -> dict[str, float]:
        """Return what a logger plots, by name; memory in GiB, the rest in the units above."""
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens_per_second,
            "samples_per_second": self.samples_per_second,
            "memory_gib": self.memory_bytes / 2**30,
            "epoch": self.epoch,
        }
