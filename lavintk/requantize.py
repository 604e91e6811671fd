"""Moves a trained model to another grid than it was trained on, and wins back what that costs.

Training makes up for the errors of one 4-bit grid; another grid makes other errors, as large as the first ones. Three
means keep the trained model: the new grid is made from the weights that were *trained on* (dequantized), it is rounded
with the layers' inputs in mind where the quantizer can (:class:`~lavintk.contracts.CalibratedQuantizer`), and what is
trained can be tuned on the new grid for some steps, towards the outputs of the model as it was. An adapter that ships
inside the weights is folded into them first, so that they are rounded once (:func:`requantize_merged`).
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lavintk.contracts import CalibratedQuantizer, Quantizer, StepInfo
from lavintk.data.batch import IGNORED, Batch
from lavintk.data.batches import BatchLoader, ImageCache, collate, make_batches
from lavintk.data.records import Record
from lavintk.data.tokenize import TokenizedRecord, TooLong, tokenize_all
from lavintk.devices import enough_memory, peak_memory
from lavintk.errors import RunError, TrainingError
from lavintk.folded import FoldedDecoder, second_moment
from lavintk.layers import FrozenLinear
from lavintk.models.build import Assembly
from lavintk.models.multimodal import LOSS_CHUNK, MultimodalModel
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice
from lavintk.report import TrainingDisplay, duration
from lavintk.run import Run, load_records
from lavintk.schedule import decay_groups, learning_rate

LANGUAGE = "language."
"""How the names of the layers that are replaced begin."""
CALIBRATION_TOKENS = 1 << 15
"""Most tokens that calibrate: they go through the layers as one batch."""
FORWARD_ROWS, FORWARD_TOKENS = 32, 1 << 13
"""Most rows and tokens of a batch that is only looked at."""
RATE_SHARE = 0.025
"""The peak learning rate of tuning on the new grid, as a share of the training's. On the demo run a calibrated model
came nearer with this share, and went away with ten times as much."""
WARMUP = 0.03
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Retuning:
    """How what is trained is tuned on the new grid.

    :param lr: peak learning rate; falls along a cosine to 0.
    :param optimizer: by name, as in a recipe.
    """

    batch_size: int = 8
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    optimizer: Choice = field(default_factory=lambda: Choice("adamw"))


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to the trained one, at the trained tokens of rows kept for this.

    :param divergence: mean Kullback-Leibler divergence of its distributions from the trained model's, in nats.
    :param agreement: share of tokens with the same first choice.
    :param tokens: how many tokens that is.
    """

    divergence: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"KL {self.divergence:.1e}, the same first choice at {self.agreement:.1%} of {self.tokens:,} tokens"


@dataclass(frozen=True)
class RequantizeReport:
    """What became of the model.

    :param quantizer: the new grid, with its options.
    :param layers: how many layers were rounded; merged, one counts for each condition that has its own.
    :param calibrated: how many of them were rounded with their inputs in mind.
    :param rows: training rows that calibrated.
    :param rounded: the model on the new grid, before tuning.
    :param retuned: what tuning made of it, or None without; where the divergence is larger, tuning was undone.
    :param steps: tuning steps taken.
    :param rounding_seconds: of calibration and rounding.
    :param tuning_seconds: of tuning, the trained model's outputs included.
    """

    quantizer: str
    layers: int
    calibrated: int
    rows: int
    rounded: Fidelity
    retuned: Fidelity | None
    steps: int
    rounding_seconds: float
    tuning_seconds: float

    @property
    def shipped(self) -> Fidelity:
        """How near the model is that was left."""
        return min(self.rounded, self.retuned or self.rounded, key=lambda fidelity: fidelity.divergence)


def requantize_run(
    run: Run,
    quantizer: Choice,
    *,
    rows: int = 32,
    held_out: int = 64,
    retune_steps: int = 0,
    layers: Collection[str] | None = None,
    console: Console | None = None,
) -> RequantizeReport:
    """Requantize the loaded model of ``run`` with its training data and settings; see :func:`requantize`.

    The model in memory changes, nothing on disk does.

    :raises RunError: the run has no training data, as one that was only imported.
    """
    data, settings = run.recipe.data, run.recipe.train
    retuning = Retuning(
        settings.batch_size, RATE_SHARE * settings.lr, settings.weight_decay, settings.betas, settings.eps,
        settings.clip, run.recipe.optim,
    )  # fmt: skip
    return requantize(
        run.assembly, quantizer, training_records(run), rows=rows, held_out=held_out,
        retune_steps=retune_steps, retuning=retuning, max_length=data.max_length, too_long=data.too_long,
        seed=settings.seed, layers=layers, console=console,
    )  # fmt: skip


def requantize_run_merged(
    run: Run,
    quantizer: Choice,
    *,
    rows: int = 32,
    held_out: int = 64,
    layers: Collection[str] | None = None,
    only_changed: bool = False,
    console: Console | None = None,
) -> tuple[RequantizeReport, MergedLayers]:
    """Fold the adapter of the loaded model of ``run`` and round with its training data: :func:`requantize_merged`.

    :raises RunError: the run has no training data, as one that was only imported.
    """
    data = run.recipe.data
    return requantize_merged(
        run.assembly, quantizer, training_records(run), rows=rows, held_out=held_out, max_length=data.max_length,
        too_long=data.too_long, seed=run.recipe.train.seed, layers=layers, only_changed=only_changed, console=console,
    )  # fmt: skip


def training_records(run: Run) -> list[Record]:
    """Return what the run was trained on.

    :raises RunError: the run has no training data, as one that was only imported.
    """
    data = run.recipe.data
    if data.train is None:
        raise RunError(f"{run.folder} was not trained here and names no training data (data.train) to requantize with")
    return load_records(data.train, data.split)


def requantize(
    assembly: Assembly,
    quantizer: Choice,
    records: Sequence[Record],
    *,
    rows: int = 32,
    held_out: int = 64,
    retune_steps: int = 0,
    retuning: Retuning | None = None,
    max_length: int = 512,
    too_long: TooLong = "drop",
    seed: int = 0,
    layers: Collection[str] | None = None,
    console: Console | None = None,
) -> RequantizeReport:
    """Put frozen linear layers of the language stack on another grid, in place.

    After a fault in the middle the model is a mixture of both grids: load it again.

    The new weights are those the model computes with now, dequantized and rounded to the new grid. Layers keep their
    identity, so adapters that wrap or remember them see the new weights. Embedding, head, norms and the vision tower
    stay as they are.

    :param records: what the model was trained on, or like it; rows are drawn at random.
    :param rows: rows whose inputs the rounding has in mind, if the quantizer can; 0 rounds without any.
    :param held_out: further rows, on which the figures of the report are taken; half of all if there are few.
    :param retune_steps: optimizer steps towards the outputs of the model as it was; the trainable parameters change.
    :param max_length: most tokens of a row, and ``too_long`` what becomes of longer ones, as in training.
    :param layers: names of the layers to round, keys of :meth:`MultimodalModel.linears`; by default all. The others
        stay as they are: what does not ship on the new grid must not be rounded to it.
    :raises RunError: a number is out of range, there are too few records, or nothing to tune.
    :raises DataError: records that cannot be used.
    :raises TrainingError: tuning came to a loss or gradient that is not finite.
    """
    console = console or Console(quiet=True)
    _check_numbers({"rows": (rows, 0), "held_out": (held_out, 1), "retune_steps": (retune_steps, 0)})
    maker = _quantizer(quantizer, assembly.model)
    if retune_steps and not assembly.model.trainable():
        raise RunError("nothing can be tuned: the model has no trainable parameters. Leave retune_steps at 0.")
    work = _Requantization(assembly, retuning or Retuning(), console, seed)
    used = max(rows, retune_steps * work.settings.batch_size)
    held, others = _drawn(assembly, records, held_out, used, max_length, too_long, seed)
    names = _language_layers(assembly.model) if layers is None else layers
    with _answering(assembly.model):
        return work.run(maker, str(quantizer), held, others, rows, retune_steps, names)


MergedLayers: TypeAlias = "dict[tuple[str, str], FrozenLinear]"
"""Rounded layers by name and condition, as :attr:`~lavintk.folded.FoldedDecoder.rounded`."""


def requantize_merged(
    assembly: Assembly,
    quantizer: Choice,
    records: Sequence[Record],
    *,
    rows: int = 32,
    held_out: int = 64,
    max_length: int = 512,
    too_long: TooLong = "drop",
    seed: int = 0,
    layers: Collection[str] | None = None,
    only_changed: bool = False,
    console: Console | None = None,
) -> tuple[RequantizeReport, MergedLayers]:
    """Fold the adapter into the weights that it was trained on and round the sums, once; the model stays as it is.

    The figures of the report are those of the folded layers, rounded where asked for; parameters are those of
    :func:`requantize`.

    :param only_changed: leave out layers that the adapter does not change, as where they lie on the grid already.
    :return: the report, and the rounded layers.
    :raises NotAffineError: the adapter has no affine form.
    :raises RunError: a number is out of range, or there are too few records.
    :raises DataError: records that cannot be used.
    """
    _check_numbers({"rows": (rows, 0), "held_out": (held_out, 1)})
    maker = _quantizer(quantizer, assembly.model)
    work = _Requantization(assembly, Retuning(), console or Console(quiet=True), seed)
    held, others = _drawn(assembly, records, held_out, rows, max_length, too_long, seed)
    names = _language_layers(assembly.model) if layers is None else layers
    with _answering(assembly.model):
        return work.run_merged(maker, str(quantizer), held, others[:rows], names, only_changed)


def _language_layers(model: MultimodalModel) -> list[str]:
    return [name for name in model.linears() if name.startswith(LANGUAGE)]


def _drawn(
    assembly: Assembly, records: Sequence[Record], held_out: int, used: int, max_length: int, too_long: TooLong,
    seed: int,
) -> tuple[list[TokenizedRecord], list[TokenizedRecord]]:  # fmt: skip
    """Return random rows to take figures on, and others to use.

    :raises RunError: there are too few.
    """
    drawn = random.Random(f"{seed}/requantize").sample(list(records), min(held_out + used, len(records)))
    tokenized, _ = tokenize_all(drawn, assembly.template, max_length, too_long=too_long)
    if used and len(tokenized) < 2:
        raise RunError("requantizing takes at least 2 records: one to calibrate with, and one to see what it did")
    held_out = min(held_out, len(tokenized) // 2) if used else held_out
    return tokenized[:held_out], tokenized[held_out:]


@contextmanager
def _answering(model: MultimodalModel) -> Iterator[None]:
    """Put the model into eval mode: the trained model's outputs are those without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Requantization:
    """The stages of :func:`requantize` and :func:`requantize_merged`; the model is in eval mode."""

    def __init__(self, assembly: Assembly, settings: Retuning, console: Console, seed: int) -> None:
        self.model, self.settings, self.console, self.seed = assembly.model, settings, console, seed
        self.read_image = None if assembly.images is None else ImageCache(assembly.images)

    def run(
        self, maker: Quantizer, name: str, held: list[TokenizedRecord], others: list[TokenizedRecord], rows: int,
        steps: int, names: Collection[str],
    ) -> RequantizeReport:  # fmt: skip
        """Remember what the model says, replace its layers, tune what is trained, and measure."""
        model, console = self.model, self.console
        expected = self.states(held)
        begun = time.monotonic()
        tuned = others[: steps * self.settings.batch_size]
        targets = self.states(tuned) if steps else []
        began_to_round = time.monotonic()
        chosen, batch = self.calibration(others[:rows])
        layers, calibrated = round_layers(model, maker, batch, names)
        rounding = time.monotonic() - began_to_round
        rounded = self.compare(held, expected, model.hidden)
        self.say(f"{layers} layers as {name}", chosen, calibrated, rounding, rounded)
        retuned = None
        if steps:
            before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
            self.tune(tuned, targets, steps)
            retuned = self.compare(held, expected, model.hidden)
            if worse := retuned.divergence > rounded.divergence:
                _put_back(model, before)
            verdict = "; worse than before, so all of it is undone" if worse else ""
            console.print(f"after {steps} steps of tuning: {retuned}{verdict}", soft_wrap=True)
        return RequantizeReport(
            name, layers, calibrated, len(chosen) if calibrated else 0, rounded, retuned, steps, rounding,
            time.monotonic() - begun - rounding if steps else 0.0,
        )  # fmt: skip

    def run_merged(
        self, maker: Quantizer, name: str, held: list[TokenizedRecord], others: list[TokenizedRecord],
        names: Collection[str], only_changed: bool,
    ) -> tuple[RequantizeReport, MergedLayers]:  # fmt: skip
        """Remember what the model says, fold and round beside it, and measure."""
        expected = self.states(held)
        begun = time.monotonic()
        chosen, batch = self.calibration(others)
        folded = FoldedDecoder(self.model)
        with enough_memory(self.model.device, "calibrating", lambda: f"Lower rows (now {len(chosen)})."):
            calibrated = folded.round(maker, names, batch, only_changed=only_changed)
        rounding, layers = time.monotonic() - begun, len(folded.rounded)
        rounded = self.compare(held, expected, folded.hidden)
        self.say(f"{layers} layers with the adapter in them as {name}", chosen, calibrated, rounding, rounded)
        rows = len(chosen) if calibrated else 0
        report = RequantizeReport(name, layers, calibrated, rows, rounded, None, 0, rounding, 0.0)
        return report, folded.rounded

    def calibration(self, rows: Sequence[TokenizedRecord]) -> tuple[list[TokenizedRecord], Batch | None]:
        """Return the rows that calibrate, and their batch on the model's device; None without any."""
        chosen = _up_to(rows, CALIBRATION_TOKENS)
        return chosen, collate(chosen, self.read_image).to(self.model.device) if chosen else None

    def say(
        self, what: str, chosen: Sequence[TokenizedRecord], calibrated: int, seconds: float, found: Fidelity
    ) -> None:
        """Print what was rounded, how, and how near it is."""
        how = f"calibrated on {len(chosen)} rows" if calibrated else "without calibration"
        self.console.print(f"{what}, {how} ({duration(seconds)}): {found}", soft_wrap=True)

    @torch.no_grad()
    def states(self, rows: Sequence[TokenizedRecord]) -> list[Tensor]:
        """Return what comes before the head at the trained tokens of each row, ``[trained, hidden]`` on the host.

        With the head, which stays, these are the distributions themselves, exactly, in a fraction of the space.
        """
        found: list[Tensor] = []
        for batch, hidden in self._answers(rows, self.model.hidden):
            counts = _trained(batch)
            found += hidden.cpu().split(counts)
        return found

    @torch.no_grad()
    def compare(
        self, rows: Sequence[TokenizedRecord], expected: Sequence[Tensor], states: Callable[[Batch], Tensor]
    ) -> Fidelity:
        """Return how near the states before the head are to what :meth:`states` gave for the same rows.

        :param states: gives those of all tokens of a batch.
        """
        divergence, same, start = 0.0, 0, 0
        for batch, hidden in self._answers(rows, states):
            stop = start + len(batch.lengths)
            wanted = torch.cat(list(expected[start:stop])).to(hidden.device)
            for part, target in zip(hidden.split(LOSS_CHUNK), wanted.split(LOSS_CHUNK)):
                logits, goal = self.model.logits(part), self.model.logits(target)
                divergence += float(_divergence(logits, goal))
                same += int((logits.argmax(-1) == goal.argmax(-1)).sum())
            start = stop
        tokens = sum(len(part) for part in expected)
        return Fidelity(divergence / tokens, same / tokens, tokens)

    def tune(self, rows: Sequence[TokenizedRecord], targets: Sequence[Tensor], steps: int) -> None:
        """Take optimizer steps that bring the model's distributions at the trained tokens to ``targets``."""
        parameters = self.model.trainable()
        settings = self.settings
        optimizer = installed_plugins().optimizers.create(settings.optimizer).build(
            decay_groups(parameters, settings.weight_decay), lr=settings.lr, betas=settings.betas, eps=settings.eps
        )  # fmt: skip
        scaler = torch.amp.GradScaler(self.model.device.type, enabled=self.model.dtype == torch.float16)
        display, started = TrainingDisplay(self.console, steps, measure="KL"), time.monotonic()
        self.model.checkpointing = self.model.device.type == "cuda"  # where memory is scarce
        with display:
            for step, (chosen, batch) in enumerate(self._windows(rows, steps)):
                begun = time.monotonic()
                rate = learning_rate(step, steps, peak=settings.lr, lowest=0.0, schedule="cosine", warmup=WARMUP)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                wanted = torch.cat([targets[index] for index in chosen])
                loss, norm = self._backward(batch, wanted, optimizer, scaler, step)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                now = time.monotonic()
                display.update(
                    StepInfo(
                        step + 1, (step + 1) * len(chosen) / len(rows), loss, rate, norm, batch.tokens,
                        batch.tokens / (now - begun), len(chosen) / (now - begun), peak_memory(self.model.device),
                        (now - started) / (step + 1) * (steps - step - 1),
                    )
                )  # fmt: skip

    def _backward(
        self, batch: Batch, wanted: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int
    ) -> tuple[float, float]:
        """Return the divergence per trained token and the gradient's norm, the gradient ready for the optimizer."""
        model, settings = self.model, self.settings
        advice = f"Lower the batch size of tuning (now {settings.batch_size})."
        with enough_memory(model.device, f"in step {step + 1} of tuning", lambda: advice):
            batch = batch.to(model.device)
            loss = (
                divergence_sum(model, _labelled(model.hidden(batch), batch), wanted.to(model.device)) / batch.labelled
            )
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        loss = loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(list(model.trainable().values()), settings.clip or float("inf"))
        if not math.isfinite(float(loss)) or not (scaler.is_enabled() or bool(torch.isfinite(norm))):
            raise TrainingError(
                f"tuning on the new grid: the loss became {float(loss)} and the gradient's norm {float(norm)} in step "
                f"{step + 1}. Lower the learning rate (now {settings.lr:g}), or export without tuning."
            )
        return float(loss), float(norm)

    def _windows(self, rows: Sequence[TokenizedRecord], steps: int) -> Iterator[tuple[list[int], Batch]]:
        """Yield the rows and the batch of each step, epoch after epoch."""
        done, epoch = 0, 0
        while done < steps:
            plan = make_batches(rows, batch_size=self.settings.batch_size, seed=self.seed, epoch=epoch)
            plan = plan[: steps - done]
            yield from zip(plan, BatchLoader(rows, plan, self.read_image))
            done, epoch = done + len(plan), epoch + 1

    def _answers(
        self, rows: Sequence[TokenizedRecord], states: Callable[[Batch], Tensor]
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of ``rows``, in order, and the states of their trained tokens."""
        plan = make_batches(rows, batch_size=FORWARD_ROWS, seed=0, epoch=0, shuffle=False, max_tokens=FORWARD_TOKENS)
        advice = "Cut longer rows off with a lower max_length."
        with enough_memory(self.model.device, "in a forward pass", lambda: advice):
            for batch in BatchLoader(rows, plan, self.read_image):
                moved = batch.to(self.model.device)
                yield batch, _labelled(states(moved), moved)


@torch.no_grad()
def round_layers(
    model: MultimodalModel, quantizer: Quantizer, batch: Batch | None, names: Collection[str] | None = None
) -> tuple[int, int]:
    """Put frozen linear layers of the language stack on the grid of ``quantizer``, in place.

    With a batch each layer is rounded when the batch comes to it, so its inputs are those that the layers before it,
    rounded already, give it; only one second moment exists at a time. Call it in eval mode.

    :param batch: rows that calibrate, on the model's device; None rounds without.
    :param names: of the layers; by default all.
    :return: how many layers were replaced, and how many of them were calibrated.
    """
    linears = model.linears()
    layers = [linears[name] for name in _language_layers(model) if names is None or name in names]
    calibrated: list[FrozenLinear] = []
    if batch is not None and isinstance(quantizer, CalibratedQuantizer):
        calibration = _Calibration(quantizer)
        handles = [layer.register_forward_hook(calibration) for layer in layers]
        try:
            with enough_memory(model.device, "calibrating", lambda: f"Lower rows (now {len(batch.lengths)})."):
                model.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        calibrated = calibration.done
    seen = {id(layer) for layer in calibrated}
    for layer in layers:
        if id(layer) not in seen:
            take_over(layer, quantizer.quantize(layer.dequantize(), layer.bias))
    return len(layers), len(calibrated)


class _Calibration:
    """A forward hook that rounds the layer for the inputs it has just had and returns what it makes of them now."""

    def __init__(self, quantizer: CalibratedQuantizer) -> None:
        self.quantizer = quantizer
        self.done: list[FrozenLinear] = []
        self._input: Tensor | None = None
        self._moment = torch.empty(0)

    def __call__(self, layer: FrozenLinear, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if any(layer is other for other in self.done):
            return output
        (x,) = arguments
        if x is not self._input:  # q, k and v share their input, and so do gate and up
            self._input, self._moment = x, second_moment(x)
        take_over(layer, self.quantizer.quantize_calibrated(layer.dequantize(), layer.bias, self._moment))
        self.done.append(layer)
        return layer.forward(x)


def as_it_is(layer: FrozenLinear) -> FrozenLinear:
    """Return a layer that stays what ``layer`` is now when that takes over another one; both share the storage."""
    return copy.copy(layer)


def take_over(layer: FrozenLinear, other: FrozenLinear) -> None:
    """Make ``layer`` the layer that ``other`` is, for everyone who refers to it; its hooks stay its own.

    :param other: of the same shape; to be forgotten.
    """
    own = {name: value for name, value in vars(layer).items() if "hook" in name or name == "training"}
    contents = {**vars(other), **own}
    layer.__class__ = type(other)
    vars(layer).clear()
    vars(layer).update(contents)


def divergence_sum(model: MultimodalModel, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of two sets of states before the head, summed over them, in nats, fp32.

    A chunk at a time and recomputed in the backward pass, as :meth:`MultimodalModel.loss_sum` does.

    :param hidden: ``[tokens, hidden]``; gradients flow to these.
    :param wanted: ``[tokens, hidden]``, of the model to come near to.
    """

    def chunk(part: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            goal = model.logits(target)
        return _divergence(model.logits(part), goal)

    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(LOSS_CHUNK), wanted.split(LOSS_CHUNK)):
        total = total + checkpoint(chunk, part, target, use_reentrant=False, preserve_rng_state=False)
    return total


def _divergence(logits: Tensor, goal: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="sum")


def _labelled(states: Tensor, batch: Batch) -> Tensor:
    """Return those of the states ``[N, hidden]`` of a batch that stand at labelled tokens."""
    return states.index_select(0, (batch.labels != IGNORED).nonzero().flatten())


def _trained(batch: Batch) -> list[int]:
    """Return the number of labelled tokens of each row."""
    return [int((labels != IGNORED).sum()) for labels in batch.labels.split(batch.lengths)]


@torch.no_grad()
def _put_back(model: MultimodalModel, values: dict[str, Tensor]) -> None:
    for name, parameter in model.trainable().items():
        parameter.copy_(values[name])


def _up_to(rows: Sequence[TokenizedRecord], tokens: int) -> list[TokenizedRecord]:
    """Return the first rows that have at most ``tokens`` tokens together, and one at least."""
    chosen: list[TokenizedRecord] = []
    for row in rows:
        tokens -= len(row)
        if tokens < 0 and chosen:
            break
        chosen.append(row)
    return chosen


def _check_numbers(numbers: dict[str, tuple[int, int]]) -> None:
    faults = [
        f"{name} must be at least {least}, got {value}" for name, (value, least) in numbers.items() if value < least
    ]
    if faults:
        raise RunError(f"cannot requantize: {'; '.join(faults)}")


def _quantizer(quantizer: Choice, model: MultimodalModel) -> Quantizer:
    """Return the quantizer.

    :raises RunError: its layers compute on another device than the model's.
    """
    maker = installed_plugins().quantizers.create(quantizer)
    if maker.requires_cuda and model.device.type != "cuda":
        raise RunError(f"the grid {quantizer} computes on CUDA only, and the model is on {model.device}")
    return maker
