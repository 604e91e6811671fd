"""Training: one loop, readable from top to bottom.

``train`` takes a recipe through its stages: load and quantize, read the records, answer the test questions, train,
answer them again. :class:`Trainer` holds what the stages share.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from rich.console import Console

from lavintk.cards import card_called
from lavintk.checkpoints import (
    TrainingState,
    checkpoints,
    how_to_go_on,
    load_checkpoint,
    load_weights,
    prune,
    save_checkpoint,
    save_model,
)
from lavintk.contracts import RunInfo, StepInfo
from lavintk.data.batch import Batch
from lavintk.data.batches import BatchLoader, ImageCache, make_batches
from lavintk.data.fingerprint import fingerprint
from lavintk.data.images import check_images
from lavintk.data.pack import GRAIN, few_sizes, round_up
from lavintk.data.records import ImageSource, Record
from lavintk.data.steps import StepOrder
from lavintk.data.tokenize import TokenizedRecord, tokenize_all
from lavintk.devices import describe, enough_memory, peak_memory, pick_device, pick_precision
from lavintk.engine import Engine, NotRecordableError, choose_engine, without_graphs
from lavintk.errors import DataError, LavintkError, OutOfMemoryError, TrainingError
from lavintk.evaluate import mean_loss
from lavintk.failures import not_finite, what_to_lower
from lavintk.features import keep_features
from lavintk.fitting import advice_for, available
from lavintk.interrupt import interruptible
from lavintk.kernels.choice import check_environment
from lavintk.machine import check_machine
from lavintk.models.build import Assembly, build
from lavintk.models.host_memory import HostTensors
from lavintk.models.multimodal import count_parameters
from lavintk.plan import MicroBatch
from lavintk.plugins import Plugins, installed_plugins
from lavintk.recipe import Recipe, make_recipe, read_recipe
from lavintk.registry import Choice
from lavintk.report import TrainingDisplay, duration, loading_bar, scores_table
from lavintk.resuming import check_resumable
from lavintk.run import CHECKPOINTS, METRICS, PREDICTIONS, Run, evaluate, load_records
from lavintk.schedule import build_optimizer, learning_rate
from lavintk.spare_memory import (
    LARGEST_ON_HOST,
    LARGEST_PACK,
    pack_sizes,
    packs_freely,
    recomputes_freely,
    settle,
    settle_on_host,
    with_kept,
)


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
    :raises LavintkError: before the first step, what is wrong; a new run then leaves no folder behind.
    :raises TrainingError: after it, with what is safe on disk in the message.
    """
    if isinstance(recipe, str):
        recipe = read_recipe(recipe)
    if not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe)
    plugins = installed_plugins()
    recipe.check(plugins)
    check_machine(recipe)
    check_environment()
    folder = Path(out) if out is not None else default_folder(recipe)
    run = Run.open(folder) if resume else Run.create(folder, recipe)
    trainer = Trainer(run, plugins, console or Console(quiet=True))
    try:
        trainer.prepare(resume)
        trainer.evaluate("before", resume)
        status = trainer.fit()
        if status != "interrupted":
            trainer.evaluate("after", resume)
    except (LavintkError, OSError) as error:
        trainer.keep_if_sound()
        if safe := trainer.abandon("failed", resume):
            kind = OutOfMemoryError if isinstance(error, OutOfMemoryError) else TrainingError
            raise kind(f"{error}\n{safe}") from error
        raise
    except BaseException as error:  # a bug, or Ctrl-C twice, perhaps within a step
        safe = trainer.abandon("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", resume)
        if safe:
            trainer.console.print(safe, markup=False, highlight=False, soft_wrap=True)
        raise
    trainer.close(status)
    trainer.assembly.model.bring_vision_back()
    return run


def default_folder(recipe: Recipe) -> Path:
    """Return ``runs/<time>-<recipe>``."""
    return Path("runs") / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{recipe.name}"


class Trainer:
    """The stages of a run."""

    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler
    assembly: Assembly
    optimizer: torch.optim.Optimizer
    engine: Engine
    capacity: int
    order: StepOrder
    read_image: ImageCache | None
    rows: list[TokenizedRecord]
    validation: list[TokenizedRecord]
    test: list[Record]

    def __init__(self, run: Run, plugins: Plugins, console: Console) -> None:
        self.run, self.recipe, self.plugins, self.console = run, run.recipe, plugins, console
        self.state = TrainingState()
        self.info: RunInfo | None = None
        self._facts: dict[str, Any] = {}
        self._saved_step = 0
        self._may_recompute_more = False

    # -- before training -------------------------------------------------------------------------------------------

    def prepare(self, resume: bool) -> None:
        """Read the records, load the model, make the optimizer; with ``resume`` put everything back.

        The manifest changes only when all of that has gone well.
        """
        self._choose_device(resume)
        if resume:
            check_resumable(self.run)
        records = self._read_records()
        self._load_model()
        self._tokenize(*records)
        self._make_optimizer()
        self._choose_engine()
        if resume:
            self._resume()
        data = self.recipe.data
        keep_features(self.assembly, self._images, data.cache_features, self.console, workers=data.workers)
        trainable = count_parameters(self.assembly.model.trainable())
        self.info = RunInfo(self.run.folder, self.recipe.name, self.recipe.dump(), self.order.total, trainable)
        self.run.use(self.assembly)
        self.run.record(
            status="running", device=describe(self.device), device_type=self.device.type,
            precision=str(self.dtype).removeprefix("torch."), base=self.assembly.base,
            trainable_parameters=trainable, total_steps=self.order.total, recipe=self.recipe.dump(), **self._facts,
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
            self.assembly, self.test, settings.name,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        )  # fmt: skip
        scores = result.scores
        figures = {f"{name}_{when}" if name == "accuracy" else name: value for name, value in scores.items()}
        figures["questions"] = int(scores["questions"])
        kept = {**kept, **figures}
        self.run.record(evaluation=kept)
        _write_lines(self.run.folder / PREDICTIONS.format(when), [vars(p) for p in result.predictions])
        self.console.print(
            f"{when} training: {scores.get('accuracy', 0):.1%} of {len(result.predictions)} questions right "
            f"({duration(time.monotonic() - started)})"
        )
        self._call("lavintk_evaluation_finished", step=self.state.step, name=settings.name.name, scores=scores)

    def _choose_device(self, resume: bool) -> None:
        settings = self.recipe.train
        self.device = pick_device(settings.device)
        self.dtype = pick_precision(settings.precision, self.device, training=True)
        begun_in = self.run.trained_in() if resume and self.run.trained_on() == self.device.type else None
        if settings.precision == "auto" and begun_in is not None:
            self.dtype = begun_in  # another machine's processor may multiply other types
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def _read_records(self) -> tuple[list[Record], list[Record]]:
        data = self.recipe.data
        assert data.train is not None, "Recipe.check asks for it"
        records = load_records(data.train, data.split)
        validation = [] if data.validation is None else load_records(data.validation, data.validation_split)
        self.test = [] if data.test is None else load_records(data.test, data.test_split)  # not after hours of training
        everything = [*records, *validation, *self.test]
        if self.recipe.model.vision is None:
            _refuse_images(everything)
        check_images(everything)
        self._facts["data"] = {"records": len(records), "sha256": fingerprint(records)}
        if self.run.manifest.get("data", self._facts["data"]) != self._facts["data"]:
            self.console.print("note: the training records are not those that the run began with")
        return records, validation

    def _load_model(self) -> None:
        started = time.monotonic()
        with loading_bar(self.console, f"loading {self.recipe.model.language}") as progress:
            self.assembly = build(
                self.recipe, self.plugins, self.device, self.dtype, cast("Any", progress), self.run.check_base,
                say=self._say, outside=self.recipe.train.stream,
                resident_layers=self.recipe.train.resident_layers,
            )  # fmt: skip
        model, images = self.assembly.model, self.assembly.images
        self.read_image = None if images is None else ImageCache(images)
        setting = self.recipe.train.checkpointing
        on_cuda = self.device.type == "cuda"
        model.checkpointing = on_cuda if setting == "auto" else setting
        if on_cuda if self.recipe.train.offload == "auto" else self.recipe.train.offload:
            model.offload = HostTensors(self.device)
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
        self._facts["tokens"] = vars(report)
        self.console.print(report)

    def _make_optimizer(self) -> None:
        settings = self.recipe.train
        optimizer = self.plugins.optimizers.create(self.recipe.optim)
        if self.device.type != "cuda" and optimizer.without_cuda:
            self.console.print(f"note: {optimizer.without_cuda}")
        self.optimizer = build_optimizer(
            optimizer, self.assembly.model.trainable(),
            lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
        )  # fmt: skip

    def _choose_engine(self) -> None:
        settings = self.recipe.train
        longest = max(len(row) for row in self.rows)
        self.capacity = settings.pack_tokens or round_up(settings.batch_size * longest, GRAIN)
        self.engine, reason = self._make_engine()
        packs, recomputed = self._packs(), ""
        if self.device.type == "cuda":
            recomputed = self._use_memory(packs)
        elif packs:
            self._grow_packs()
        self.order = StepOrder(self.rows, settings, self.capacity if packs else None)
        why = f" ({reason})" if reason else ""
        self._say(", ".join([f"engine {self.engine.name}{why}", *filter(None, [recomputed, self.order.describe()])]))

    def _make_engine(self) -> tuple[Engine, str]:
        settings = self.recipe.train
        return choose_engine(settings.engine, self.assembly.model, self.scaler, self.capacity, settings.seed, self._say)

    def _packs(self) -> bool:
        """Whether the rows of a step are put together anew."""
        settings = self.recipe.train
        if settings.pack != "auto" or self.engine.records:
            return settings.pack is not False
        on_cpu = self.device.type == "cpu" and self.engine.name == "eager"
        # LaVIN's own way of routing depends on who is in a micro-batch
        return on_cpu and settings.accumulate > 1 and not self.assembly.model.manner.blank_first

    def _grow_packs(self) -> None:
        """Settle how many tokens a pack has on a CPU; a run that goes on keeps what it began with."""
        batches = [self._micro_batch(tokens, packs=True) for tokens in self._pack_sizes(True)]
        free = psutil.virtual_memory().available
        settled = settle_on_host(self.assembly.model, self.recipe, self.plugins, free, batches)
        self.capacity = self._facts["pack_tokens"] = settled.tokens

    def _use_memory(self, packs: bool) -> str:
        """Settle on a CUDA device what the recipe leaves open, foretell its memory, and say how much is recomputed.

        A run that goes on keeps what it began with: dropout then draws the same.
        """
        model, recipe, before = self.assembly.model, self.recipe, self.run.manifest

        def advice() -> str:
            return advice_for(recipe, self.plugins, self.device)

        batches = [self._micro_batch(tokens, packs) for tokens in self._pack_sizes(packs)]
        free = recomputes_freely(recipe, self.engine.name)
        if free:
            with enough_memory(self.device, "in a decoder layer", advice):
                batches = with_kept(batches, model)
        settled = settle(
            model, recipe, self.plugins, available(self.device), card_called(torch.cuda.get_device_name(self.device)),
            batches, self.engine.name, least=before.get("recomputed_layers", 0),
        )  # fmt: skip
        self._facts["predicted_memory_bytes"] = settled.plan.allocated
        if settled.batch.tokens != self.capacity:
            self.capacity = settled.batch.tokens
            self.engine, _ = self._make_engine()
        if packs:
            self._facts["pack_tokens"] = self.capacity
        if not free:
            return ""
        layers = len(model.layers)
        self._facts["recomputed_layers"] = settled.recomputed
        self._may_recompute_more = settled.recomputed < layers
        model.checkpointing = True if settled.recomputed == layers else settled.recomputed
        return f"{settled.recomputed} of {layers} layers recomputed"

    def _pack_sizes(self, packs: bool) -> list[int]:
        """Return what a full micro-batch may have of tokens, the smallest first."""
        before, on_host = self.run.manifest.get("pack_tokens"), self.device.type != "cuda"
        freely = self.recipe.train.pack_tokens is None if on_host else packs_freely(self.recipe, self.engine.name)
        if not packs or not freely:
            return [self.capacity]
        rows = self.recipe.train.batch_size * self.recipe.train.accumulate
        in_step = math.ceil(min(rows, len(self.rows)) * sum(map(len, self.rows)) / len(self.rows))
        largest = LARGEST_ON_HOST if on_host else LARGEST_PACK
        return [before] if before else pack_sizes(self.capacity, in_step, largest)

    def _micro_batch(self, tokens: int, packs: bool) -> MicroBatch:
        images = StepOrder(self.rows, self.recipe.train, tokens if packs else None).most_images()
        return MicroBatch(tokens, few_sizes(images) if packs and images else images)

    def _loader(self, rows: list[TokenizedRecord], plan: list[list[int]]) -> BatchLoader:
        find_features, workers = self.assembly.find_features, self.recipe.data.workers
        return BatchLoader(rows, plan, self.read_image, find_features=find_features, workers=workers)

    def _images(self) -> dict[ImageSource, str]:
        """Return the images of the rows still to come and of validation and test, each with a record that has it."""
        owners: list[Record | TokenizedRecord] = [self.rows[index] for index in self.order.rows_from(self.state.step)]
        owners += [*self.validation, *self.test]
        return {source: owner.id for owner in owners for source in owner.images}

    def _resume(self) -> None:
        newest = checkpoints(self.run.folder)[-1]
        self.state = load_checkpoint(newest, self.assembly.model, self.optimizer, self.scaler)
        self._saved_step = self.state.step
        self.console.print(f"resuming after step {self.state.step} of {self.order.total}")

    # -- training --------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        """Take the remaining optimizer steps; return how it ended."""
        self.assembly.model.train()
        status = "finished"
        started = time.monotonic() - self.state.seconds
        display = TrainingDisplay(self.console, self.order.total, self.state.step)
        notice = "stopping after this step; Ctrl-C once more stops at once, without saving it"
        with interruptible(lambda: display.say(notice)) as interrupted, display:
            for window in self.windows():
                info = self.step(window, started)
                display.update(info)
                self._log(info)
                last = self.state.step == self.order.total
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
        self._drop_engine()  # answering needs room too
        self._end(status)
        return status

    def windows(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each remaining optimizer step; the order depends on seed and epoch alone."""
        for plan in self.order.epochs_from(self.state.step):
            loader = iter(self._loader(self.rows, [batch for window in plan for batch in window]))
            for window in plan:
                yield [next(loader) for _ in window]

    def step(self, window: list[Batch], started: float) -> StepInfo:
        """Take one optimizer step over ``window``; every labelled token of the window weighs the same.

        :raises TrainingError: the loss or the gradient is not finite; nothing was changed.
        :raises OutOfMemoryError: nothing was changed.
        """
        settings, step = self.recipe.train, self.state.step
        begun = time.monotonic()
        rate = learning_rate(
            step, self.order.total, peak=settings.lr, lowest=settings.min_lr, schedule=settings.schedule,
            warmup=settings.warmup,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labelled = sum(batch.labelled for batch in window)
        self.optimizer.zero_grad(set_to_none=False)
        losses = self._backward(window, labelled)
        loss = float(torch.stack(losses).sum())
        if not math.isfinite(loss):
            guilty = [batch for batch, part in zip(window, losses) if not bool(torch.isfinite(part))]
            raise TrainingError(not_finite("loss", loss, guilty or window, self.run, step, self.dtype))
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or float("inf"))
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # the scaler leaves such a step out by itself
            raise TrainingError(not_finite("gradient's norm", float(norm), window, self.run, step, self.dtype))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state.step += 1
        now = time.monotonic()
        self.state.seconds = now - started
        tokens, samples = sum(b.tokens for b in window), sum(len(b.lengths) for b in window)
        return StepInfo(
            self.state.step, self.state.step / self.order.per_epoch, loss, rate, float(norm), tokens,
            tokens / (now - begun), samples / (now - begun), peak_memory(self.device),
            self.state.seconds / self.state.step * (self.order.total - self.state.step),
        )  # fmt: skip

    def _backward(self, window: list[Batch], labelled: int) -> list[torch.Tensor]:
        step = self.state.step

        def advice() -> str:
            checkpointing = bool(self.assembly.model.checkpointing)
            return what_to_lower(window, self.run, step, self.plugins, self.device, checkpointing)

        with enough_memory(self.device, f"in step {step + 1}", advice):
            if self._may_recompute_more:
                with suppress(torch.OutOfMemoryError):  # lets go of what the step had computed
                    return self._gradients(window, labelled)
                self._recompute_all()
            return self._gradients(window, labelled)

    def _gradients(self, window: list[Batch], labelled: int) -> list[torch.Tensor]:
        try:
            return self.engine.backward(window, labelled, self.state.step)
        except NotRecordableError as error:
            self._go_on_eagerly(str(error))
            self.optimizer.zero_grad(set_to_none=False)
            return self.engine.backward(window, labelled, self.state.step)

    def _recompute_all(self) -> None:
        """Make room on a device that turned out to be too small for layers that keep what they computed."""
        self._say(
            "note: memory does not suffice for layers that keep what they computed: all are recomputed from now on"
        )
        self._drop_engine()
        self._may_recompute_more, self.assembly.model.checkpointing = False, True
        self.run.record(recomputed_layers=len(self.assembly.model.layers))
        self.optimizer.zero_grad(set_to_none=False)
        self.engine, _ = self._make_engine()

    def _drop_engine(self) -> None:
        """Give the memory of recorded steps back."""
        del self.engine
        if (offload := self.assembly.model.offload) is not None:
            offload.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _go_on_eagerly(self, reason: str) -> None:
        if self.recipe.train.engine == "graph":
            raise TrainingError(f"train.engine is 'graph', but {reason}. Use --engine auto or eager.")
        self.engine = without_graphs(self.engine)
        self._say(f"note: engine {self.engine.name} without CUDA graphs: {reason}")

    # -- what surrounds a step -------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        """Whether something is due after this step: every so many steps, or at the end of each epoch."""
        return self.state.step % (every or self.order.per_epoch) == 0

    def _validate(self, display: TrainingDisplay) -> None:
        if not self.validation:
            return
        settings = self.recipe.train
        size = settings.batch_size
        plan = make_batches(self.validation, batch_size=size, seed=0, epoch=0, shuffle=False)
        with enough_memory(self.device, "in the validation", lambda: f"Lower train.batch_size (now {size})."):
            loss = mean_loss(self.assembly.model, self._loader(self.validation, plan))
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
        if info.step % self.recipe.train.log_every == 0 or info.step == self.order.total:
            _write_lines(self.run.folder / METRICS, [vars(info)], append=True)
            self._call("lavintk_step_finished", step=info)

    def _save(self) -> None:
        self._saved_step = self.state.step  # or tried to: what failed once is not tried again
        folder = save_checkpoint(
            self.run.folder, self.assembly.model, self.recipe.model.language, self.optimizer, self.scaler, self.state
        )
        prune(self.run.folder, self.recipe.train.keep, self.state.best_step)
        self._call("lavintk_checkpoint_saved", step=self.state.step, folder=str(folder))

    def keep_if_sound(self) -> None:
        """Save what has been learned before a fault, unless the weights themselves are broken."""
        if self.state.step == self._saved_step:
            return
        self.optimizer.zero_grad(set_to_none=True)  # makes room on a device that ran out of memory
        parameters = self.assembly.model.trainable().values()
        if all(bool(torch.isfinite(p).all()) for p in parameters):
            with suppress(LavintkError, OSError):  # the first fault is the one to show
                self._save()

    def _end(self, status: str) -> None:
        """Put the best weights in place, or the last ones where nothing was validated."""
        model, folder = self.assembly.model, self.run.folder
        if status == "interrupted":
            self.console.print(f"interrupted after step {self.state.step}; go on with: lavintk train --resume {folder}")
        if self.state.best_step and status != "interrupted":
            load_weights(model, folder / CHECKPOINTS / f"step-{self.state.best_step:06d}")
        save_model(folder, model, self.recipe.model.language)
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

    def abandon(self, status: str, resumed: bool) -> str:
        """End a run that cannot go on; return what is safe and how to go on, or nothing if it took no step.

        A new run that took no step leaves no folder, so that its command can be repeated as it is.
        """
        if self.info is not None:
            with suppress(LavintkError, OSError):  # the first fault is the one to show
                self.close(status)
        if not resumed and not self.state.step:
            self.run.discard()
        return how_to_go_on(self.run.folder) if self.state.step else ""

    def _say(self, line: str) -> None:
        """Print a line as it is, however long."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _call(self, hook: str, **arguments: Any) -> None:
        self.plugins.call(hook, run=self.info, **arguments)


def _refuse_images(records: list[Record]) -> None:
    """Refuse records with images where nothing could look at them."""
    ids = [record.id for record in records if record.images]
    if ids:
        fault = f"{len(ids)} of {len(records)} records have an image (the first is {ids[0]!r}), and no model sees them"
        raise DataError("the data", [fault], "Name a vision tower with --vision (model.vision), or leave them out.")


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
