"""Training: one loop, readable from top to bottom.

``train`` takes a recipe through its stages: load and quantize, read the records, answer the test questions, train,
answer them again. :class:`Trainer` holds what the stages share.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from lavintk.checkpoints import (
    TrainingState,
    checkpoints,
    load_checkpoint,
    load_weights,
    prune,
    save_checkpoint,
    save_weights,
)
from lavintk.contracts import RunInfo, StepInfo
from lavintk.data.batch import Batch
from lavintk.data.batches import BatchLoader, ImageCache, make_batches
from lavintk.data.images import check_images
from lavintk.data.records import Record
from lavintk.data.tokenize import TokenizedRecord, tokenize_all
from lavintk.devices import describe, peak_memory, pick_device, pick_precision
from lavintk.errors import LavintkError, OutOfMemoryError, RunError, TrainingError
from lavintk.evaluate import mean_loss
from lavintk.models.build import Assembly, build
from lavintk.models.multimodal import count_parameters
from lavintk.plugins import Plugins, installed_plugins
from lavintk.recipe import Recipe, make_recipe, read_recipe
from lavintk.registry import Choice
from lavintk.report import TrainingDisplay, duration, loading_bar, scores_table
from lavintk.run import METRICS, MODEL, Run, evaluate, load_records
from lavintk.schedule import decay_groups, learning_rate


def train(
    recipe: Recipe | Mapping[str, Any] | str,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train what ``recipe`` says and return the run with its model loaded.

    :param recipe: a recipe, its raw content, a shipped name or a YAML file.
    :param out: the run's folder; by default ``runs/<time>-<recipe>``. It must not exist unless ``resume`` is set.
    :param resume: go on from the newest checkpoint in ``out``.
    :raises LavintkError: with what is safe on disk in the message.
    """
    if isinstance(recipe, str):
        recipe = read_recipe(recipe)
    if not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe)
    plugins = installed_plugins()
    recipe.check(plugins)
    folder = Path(out) if out is not None else default_folder(recipe)
    run = Run.open(folder) if resume else Run.create(folder, recipe)
    trainer = Trainer(run, plugins, console or Console(quiet=True))
    try:
        trainer.prepare(resume)
        trainer.evaluate("before", resume)
        status = trainer.fit()
        if status != "interrupted":
            trainer.evaluate("after", resume)
    except BaseException:
        trainer.close("failed")
        raise
    trainer.close(status)
    return run


def default_folder(recipe: Recipe) -> Path:
    """Return ``runs/<time>-<recipe>``."""
    return Path("runs") / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{recipe.name}"


class Trainer:
    """The stages of a run."""

    assembly: Assembly
    optimizer: torch.optim.Optimizer
    read_image: ImageCache | None
    rows: list[TokenizedRecord]
    validation: list[TokenizedRecord]

    def __init__(self, run: Run, plugins: Plugins, console: Console) -> None:
        self.run, self.recipe, self.plugins, self.console = run, run.recipe, plugins, console
        settings = self.recipe.train
        self.device = pick_device(settings.device)
        self.dtype = pick_precision(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state = TrainingState()
        self.info: RunInfo | None = None

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(self, resume: bool) -> None:
        """Read the records, load the model, make the optimizer; with ``resume`` put everything back."""
        records = self._read_records()
        self._load_model()
        self._tokenize(*records)
        self._make_optimizer()
        if resume:
            self._resume()
        trainable = count_parameters(self.assembly.model.trainable())
        self.info = RunInfo(self.run.folder, self.recipe.name, self.recipe.dump(), self.total_steps, trainable)
        self.run.use(self.assembly)
        self.run.record(
            status="running", device=describe(self.device), precision=str(self.dtype).removeprefix("torch."),
            base=self.assembly.base, trainable_parameters=trainable, total_steps=self.total_steps,
        )  # fmt: skip
        self._call("lavintk_run_started")

    def evaluate(self, when: str, resume: bool = False) -> None:
        """Answer the test records ``"before"`` or ``"after"`` training and keep the figures."""
        kept = self.run.manifest.get("evaluation", {})
        data, settings = self.recipe.data, self.recipe.evaluation
        if data.test is None or (when == "before" and (not settings.before or (resume and kept))):
            return
        started = time.monotonic()
        result = evaluate(
            self.assembly, load_records(data.test, data.test_split), settings.name,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        )  # fmt: skip
        scores = result.scores
        figures = {f"{name}_{when}" if name == "accuracy" else name: value for name, value in scores.items()}
        figures["questions"] = int(scores["questions"])
        kept = {**kept, **figures}
        self.run.record(evaluation=kept)
        _write_lines(self.run.folder / f"predictions_{when}.jsonl", [vars(p) for p in result.predictions])
        self.console.print(
            f"{when} training: {scores.get('accuracy', 0):.1%} of {len(result.predictions)} questions right "
            f"({duration(time.monotonic() - started)})"
        )
        self._call("lavintk_evaluation_finished", step=self.state.step, name=settings.name.name, scores=scores)

    def _read_records(self) -> tuple[list[Record], list[Record]]:
        data = self.recipe.data
        records = load_records(data.train, data.split)
        validation = [] if data.validation is None else load_records(data.validation, data.validation_split)
        check_images([*records, *validation])
        self.run.record(data={"records": len(records), "sha256": fingerprint(records)})
        return records, validation

    def _load_model(self) -> None:
        started = time.monotonic()
        with loading_bar(self.console, f"loading {self.recipe.model.language}") as progress:
            self.assembly = build(self.recipe, self.plugins, self.device, self.dtype, cast("Any", progress))
        model, images = self.assembly.model, self.assembly.images
        self.read_image = None if images is None else ImageCache(images)
        setting = self.recipe.train.checkpointing
        model.checkpointing = self.device.type == "cuda" if setting == "auto" else setting
        linears = model.linears().values()
        weights = sum(layer.out_features * layer.in_features for layer in linears)
        self.console.print(
            f"{self.recipe.model.language} on {describe(self.device)}: {weights / 1e6:,.0f} M linear weights "
            f"as {self.recipe.quant}, {count_parameters(model.trainable()) / 1e6:.2f} M trainable "
            f"({self.recipe.adapter}), compute {str(self.dtype).removeprefix('torch.')} "
            f"({duration(time.monotonic() - started)})"
        )

    def _tokenize(self, records: list[Record], validation: list[Record]) -> None:
        data = self.recipe.data
        self.rows, report = tokenize_all(records, self.assembly.template, data.max_length, too_long=data.too_long)
        self.validation = []
        if validation:
            self.validation, _ = tokenize_all(
                validation, self.assembly.template, data.max_length, too_long=data.too_long
            )
        self.run.record(tokens=vars(report))
        self.console.print(report)

    def _make_optimizer(self) -> None:
        settings = self.recipe.train
        optimizer = self.plugins.optimizers.create(self.recipe.optim)
        if self.device.type != "cuda" and optimizer.without_cuda:
            self.console.print(f"note: {optimizer.without_cuda}")
        groups = decay_groups(self.assembly.model.trainable(), settings.weight_decay)
        self.optimizer = optimizer.build(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    def _resume(self) -> None:
        saved = checkpoints(self.run.folder)
        if not saved:
            raise RunError(f"{self.run.folder} holds no checkpoint to go on from; start it anew")
        self.state = load_checkpoint(saved[-1], self.assembly.model, self.optimizer, self.scaler)
        self.console.print(f"resuming after step {self.state.step} of {self.total_steps}")

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every row once."""
        micro_batches = -(-len(self.rows) // self.recipe.train.batch_size)
        return -(-micro_batches // self.recipe.train.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        settings = self.recipe.train
        return settings.max_steps or max(1, round(settings.epochs * self.steps_per_epoch))

    def fit(self) -> str:
        """Take the remaining optimizer steps; return how it ended."""
        self.assembly.model.train()
        status = "finished"
        started = time.monotonic() - self.state.seconds
        display = TrainingDisplay(self.console, self.total_steps, self.state.step)
        with interruptible() as interrupted, display:
            for window in self.windows():
                try:
                    info = self.step(window, started)
                except LavintkError:
                    self._save_if_sound()
                    raise
                display.update(info)
                self._log(info)
                last = self.state.step == self.total_steps
                if last or self._due(self.recipe.train.eval_every):
                    self._validate(display)
                if interrupted():
                    status = "interrupted"
                elif self.recipe.train.patience and self.state.stale >= self.recipe.train.patience:
                    status = "stopped early"
                if last or status != "finished" or self._due(self.recipe.train.save_every):
                    self._save()
                if status != "finished":
                    break
        self._end(status)
        return status

    def windows(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining optimizer step; the order depends on seed and epoch alone."""
        settings = self.recipe.train
        while self.state.step < self.total_steps:
            epoch, offset = divmod(self.state.step, self.steps_per_epoch)
            plan = make_batches(self.rows, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch)
            start = offset * settings.accumulate
            loader = BatchLoader(self.rows, plan, self.read_image, start=start)
            window: list[Batch] = []
            for index, batch in enumerate(loader, start=start + 1):
                window.append(batch)
                if len(window) == settings.accumulate or index == len(plan):
                    yield window
                    window = []
                    if self.state.step == self.total_steps:
                        return

    def step(self, window: list[Batch], started: float) -> StepInfo:
        """Take one optimizer step over ``window``; every labelled token of the window weighs the same.

        :raises TrainingError: the loss or the gradient is not finite; nothing was changed.
        :raises OutOfMemoryError: nothing was changed.
        """
        settings, step = self.recipe.train, self.state.step
        begun = time.monotonic()
        rate = learning_rate(
            step, self.total_steps, peak=settings.lr, lowest=settings.min_lr, schedule=settings.schedule,
            warmup=settings.warmup,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labelled = sum(batch.labelled for batch in window)
        losses = self._backward(window, labelled)
        loss = float(torch.stack(losses).sum())
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(self._not_finite(window, losses))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.assembly.model.trainable().values()), settings.clip or float("inf")
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        now = time.monotonic()
        self.state.seconds = now - started
        tokens, samples = sum(b.tokens for b in window), sum(len(b.lengths) for b in window)
        return StepInfo(
            self.state.step, self.state.step / self.steps_per_epoch, loss, rate, float(norm), tokens,
            tokens / (now - begun), samples / (now - begun), peak_memory(self.device),
            self.state.seconds / self.state.step * (self.total_steps - self.state.step),
        )  # fmt: skip

    def _backward(self, window: list[Batch], labelled: int) -> list[torch.Tensor]:
        losses = []
        try:
            for batch in window:
                loss = self.assembly.model.loss_sum(batch.to(self.device)) / labelled
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
        except torch.cuda.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise OutOfMemoryError(self._out_of_memory(window)) from error
        return losses

    # -- what surrounds a step -------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        """Whether something is due after this step: every so many steps, or at the end of each epoch."""
        return self.state.step % (every or self.steps_per_epoch) == 0

    def _validate(self, display: TrainingDisplay) -> None:
        if not self.validation:
            return
        settings = self.recipe.train
        plan = make_batches(self.validation, batch_size=settings.batch_size, seed=0, epoch=0, shuffle=False)
        loss = mean_loss(self.assembly.model, BatchLoader(self.validation, plan, self.read_image))
        better = loss < self.state.best_loss
        if better:
            self.state.best_loss, self.state.best_step, self.state.stale = loss, self.state.step, 0
            self._save()
        else:
            self.state.stale += 1
        display.say(f"validation loss {loss:.4f} after step {self.state.step}{' (best)' if better else ''}")
        _write_lines(self.run.folder / METRICS, [{"step": self.state.step, "validation_loss": loss}], append=True)
        self._call("lavintk_evaluation_finished", step=self.state.step, name="loss", scores={"loss": loss})

    def _log(self, info: StepInfo) -> None:
        if info.step % self.recipe.train.log_every == 0 or info.step == self.total_steps:
            _write_lines(self.run.folder / METRICS, [vars(info)], append=True)
            self._call("lavintk_step_finished", step=info)

    def _save(self) -> None:
        folder = save_checkpoint(
            self.run.folder, self.assembly.model, self.recipe.model.language, self.optimizer, self.scaler, self.state
        )
        prune(self.run.folder, self.recipe.train.keep, self.state.best_step)
        self._call("lavintk_checkpoint_saved", step=self.state.step, folder=str(folder))

    def _save_if_sound(self) -> None:
        """Keep what has been learned before a fault, unless the weights themselves are broken."""
        parameters = self.assembly.model.trainable().values()
        if self.state.step and all(bool(torch.isfinite(p).all()) for p in parameters):
            self._save()

    def _end(self, status: str) -> None:
        """Put the best weights in place, or the last ones where nothing was validated."""
        model, folder = self.assembly.model, self.run.folder
        if status == "interrupted":
            self.console.print(f"interrupted after step {self.state.step}; go on with: lavintk train --resume {folder}")
        if self.state.best_step and status != "interrupted":
            load_weights(model, folder / "checkpoints" / f"step-{self.state.best_step:06d}")
        save_weights(model, folder / MODEL, self.recipe.model.language)
        self.run.record(
            steps=self.state.step, best_step=self.state.best_step or None, peak_memory_bytes=peak_memory(self.device),
            training_seconds=round(self.state.seconds, 1),
        )  # fmt: skip

    def close(self, status: str) -> None:
        """Write how the run ended and tell the plugins."""
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.run.record(status=status, finished=finished, peak_memory_bytes=peak_memory(self.device))
        if self.info is not None:
            self._call("lavintk_run_finished", status=status)
        evaluation = self.run.manifest.get("evaluation")
        if status in ("finished", "stopped early") and evaluation:
            self.console.print(summary(evaluation, self.recipe.data.test))

    def _call(self, hook: str, **arguments: Any) -> None:
        self.plugins.call(hook, run=self.info, **arguments)

    def _not_finite(self, window: list[Batch], losses: list[torch.Tensor]) -> str:
        guilty = [b for b, loss in zip(window, losses) if not bool(torch.isfinite(loss))]
        ids = [name for batch in guilty for name in batch.record_ids]
        return (
            f"the loss became {float(torch.stack(losses).sum())} in step {self.state.step + 1}, with the records "
            f"{', '.join(ids[:20])}{' ...' if len(ids) > 20 else ''}. Nothing of this step was applied; the newest "
            f"checkpoint is {self._newest()}. Look at these records with `lavintk data preview`, or lower train.lr "
            f"({self.recipe.train.lr:g}) or use train.precision=bf16."
        )

    def _out_of_memory(self, window: list[Batch]) -> str:
        settings = self.recipe.train
        total = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        longest = max(max(batch.lengths) for batch in window)
        advice = [f"train.batch_size (now {settings.batch_size})"] if settings.batch_size > 1 else []
        advice.append(f"data.max_length (now {self.recipe.data.max_length}; this row has {longest} tokens)")
        if not self.assembly.model.checkpointing:
            advice.insert(0, "set train.checkpointing=true")
        return (
            f"{describe(self.device)} ran out of memory in step {self.state.step + 1}: "
            f"{peak_memory(self.device) / 2**30:.2f} GiB allocated at peak of {total:.1f} GiB. "
            f"Lower {', or '.join(advice)}. The newest checkpoint is {self._newest()}."
        )

    def _newest(self) -> str:
        saved = checkpoints(self.run.folder)
        return str(saved[-1]) if saved else "none (no step was finished)"


@contextmanager
def interruptible() -> Iterator[Any]:
    """Yield a function that tells whether Ctrl-C was pressed; pressing it again stops at once."""
    pressed = False

    def remember(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not in the main thread: leave signals alone
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def fingerprint(records: list[Record]) -> str:
    """Return a SHA-256 over ids, messages and images of the records (file names and sizes, or encoded bytes)."""
    digest = hashlib.sha256()
    for record in records:
        images = [
            hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else f"{image.name}:{image.stat().st_size}"
            for image in record.images
        ]
        content = [record.id, [(m.role, m.text) for m in record.messages], images]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def summary(evaluation: Mapping[str, float], test: Choice | None) -> Any:
    """Return the table of accuracies before and after training."""

    def scores(when: str) -> dict[str, float] | None:
        if f"accuracy_{when}" not in evaluation:
            return None
        return {**evaluation, "accuracy": evaluation[f"accuracy_{when}"]}

    return scores_table(scores("before"), scores("after"), f"{evaluation['questions']} test questions ({test})")


def _write_lines(path: Path, entries: list[Mapping[str, Any]] | list[dict[str, Any]], append: bool = False) -> None:
    with path.open("a" if append else "w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
