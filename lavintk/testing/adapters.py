"""What :func:`lavintk.testing.check_adapter` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavintk.contracts import Adapter, AffineUpdate, ApproximateGradient
from lavintk.data.batch import IMAGE, TEXT, Batch
from lavintk.errors import CheckpointError, NotAffineError
from lavintk.layers import DenseLinear
from lavintk.merge import merged
from lavintk.models.multimodal import MultimodalModel
from lavintk.testing.models import tiny_batch, tiny_model
from lavintk.testing.outcome import Report
from lavintk.testing.promises import Promise, Promises, class_name, relative_error

IDENTITY, EXACT = 1e-5, 1e-4
"""Relative differences that fp32 may make: of an adapter that adds nothing, and of one that is folded."""
NOISE = 1e-5
"""What fp32 may change of a linear layer's output, relative to it."""
OVERHEAD = 1 << 16
"""Bytes that a saved adapter may have besides its parameters: headers, options, a description."""
SLOPE, RISE = 0.02, 0.02
"""How exact a gradient must be, and how far the loss is to rise and fall for the difference that it is compared with:
more bends, less drowns in fp32's rounding."""
PARTS = ("language.", "vision.")
ROWS = {"text": (TEXT,), "image": (IMAGE,)}


def check(make: Callable[[], Adapter], vision: bool) -> Report:
    """See :func:`lavintk.testing.check_adapter`."""
    questions = _Questions(Promises(class_name(make())), make, vision)
    questions.start()
    questions.parameters()
    questions.gradients()
    questions.files()
    questions.updates()
    return questions.promises.report()


@dataclass
class _Seen:
    """What went into a linear layer and came out, the tokens without the side tokens."""

    x: Tensor
    y: Tensor


class _Questions:
    """What is asked of an adapter."""

    def __init__(self, promises: Promises, make: Callable[[], Adapter], vision: bool) -> None:
        self.promises, self.make, self.vision = promises, make, vision
        self.every = (TEXT, IMAGE) if vision else (TEXT,)

    def attached(self, trained: bool = True) -> tuple[MultimodalModel, Adapter]:
        """Return the model with a new adapter, as after training unless ``trained`` is false."""
        model = tiny_model(self.vision)
        torch.manual_seed(3)
        adapter = self.make()
        model.attach(adapter)
        if trained:
            generator = torch.Generator().manual_seed(4)
            for _, parameter in adapter.named_parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval(), adapter

    def start(self) -> None:
        """Ask what attaching does."""
        with self.promises.keep("Adapter.attach", "changes no output at the start") as promise:
            plain = tiny_model(self.vision)
            model, adapter = self.attached(trained=False)
            for conditions in {self.every, (TEXT,)}:
                expected, batch = _logits(plain, tiny_batch(plain, conditions)), tiny_batch(plain, conditions)
                for mode in (False, True):
                    what = f"logits of a fresh adapter {'in training' if mode else 'in eval mode'}"
                    promise.require_close(_logits(model.train(mode), batch), expected, IDENTITY, what)
        with self.promises.keep("Adapter.conditions", "names what the adapter's effect depends on") as promise:
            known = adapter.conditions
            good = isinstance(known, tuple) and len(known) > 0 and all(isinstance(name, str) for name in known)
            promise.require(good, f"it is {known!r}")
        text = "returns a row for each condition, or None"
        with self.promises.keep("Adapter.side_tokens", text) as promise:
            side, shape = adapter.side_tokens(), (len(adapter.conditions), model.hidden_size)
            good = side is None or tuple(side.shape) == shape
            promise.require(good, f"it has the shape {side is not None and list(side.shape)}, not {list(shape)}")

    def parameters(self) -> None:
        """Ask which parameters there are."""
        with self.promises.keep(
            "Adapter.named_parameters", "yields trainable parameters by stable, unique names"
        ) as promise:
            (model, adapter), (_, other) = self.attached(), self.attached()
            names = [name for name, _ in adapter.named_parameters()]
            promise.require(len(names) > 0, "there is none")
            promise.require(len(set(names)) == len(names), f"{len(names) - len(set(names))} names come twice")
            again = [name for name, _ in adapter.named_parameters()]
            elsewhere = [name for name, _ in other.named_parameters()]
            promise.require(names == again == elsewhere, "another call or another adapter of the kind has other names")
            frozen = [name for name, p in adapter.named_parameters() if not p.requires_grad]
            promise.require(not frozen, f"{', '.join(frozen[:3])} require no gradient")
            base = {id(p) for p in model.frozen_parameters().values()}
            taken = [name for name, p in adapter.named_parameters() if id(p) in base]
            promise.require(not taken, f"{', '.join(taken[:3])} belong to the frozen model")

    def gradients(self) -> None:
        """Ask what trains."""
        with self.promises.keep("Adapter.named_parameters", "can be trained from the start") as promise:
            model, adapter = self.attached(trained=False)
            model.loss_sum(tiny_batch(model, self.every)).backward()
            flows = [p.grad is not None and bool(p.grad.any()) for _, p in adapter.named_parameters()]
            promise.require(any(flows), f"none of its {len(flows)} parameters has a gradient, so it stays as it is")
        with self.promises.keep("Adapter.named_parameters", "yields all that trains, and all of it trains") as promise:
            model, adapter = self.attached()
            before = _frozen_state(model)
            batch = tiny_batch(model, self.every)
            loss = model.loss_sum(batch)
            loss.backward()
            own = dict(adapter.named_parameters())
            idle = [n for n, p in own.items() if p.grad is None or not bool(p.grad.any()) or not _finite(p.grad)]
            promise.require(
                not idle, f"no or no finite gradient reaches {len(idle)} of {len(own)}: {', '.join(idle[:3])}"
            )
            known = {id(p) for p in model.trainable().values()}
            others = [name for name, p in model.named_parameters() if id(p) not in known and p.grad is not None]
            promise.require(not others, f"{len(others)} other parameters get a gradient: {', '.join(others[:3])}")
            tracked = [name for name, b in model.named_buffers() if b.requires_grad]
            promise.require(not tracked, f"frozen weights require a gradient: {', '.join(tracked[:3])}")
            with torch.no_grad():
                for parameter in own.values():
                    parameter.sub_(1e-3 * cast(Tensor, parameter.grad))
            changed = [name for name, tensor in _frozen_state(model).items() if not torch.equal(tensor, before[name])]
            promise.require(not changed, f"a step changed frozen weights: {', '.join(changed[:3])}")
        self._slope()

    def _slope(self) -> None:
        adapter = self.make()
        if isinstance(adapter, ApproximateGradient) and adapter.inexact_gradient:
            self.promises.skip("Adapter.named_parameters", f"the gradient: {adapter.inexact_gradient}")
            return
        with self.promises.keep("Adapter.named_parameters", "get the gradient of the loss") as promise:
            model, adapter = self.attached()
            batch, own = tiny_batch(model, self.every), [p for _, p in adapter.named_parameters()]
            model.loss_sum(batch).backward()
            # along the gradient itself, where the difference is largest beside fp32's rounding
            found = [p.grad.clone() for p in own if p.grad is not None]
            size = float(torch.stack([g.norm() for g in found]).norm())
            step, losses = RISE / size, list[float]()
            for sign in (1, -1):
                _walk(own, found, sign * step / size)
                with torch.no_grad():
                    losses.append(float(model.loss_sum(batch)))
                _walk(own, found, -sign * step / size)
            slope = (losses[0] - losses[1]) / (2 * step)
            promise.require(
                abs(slope - size) <= SLOPE * size,
                f"along it the loss rises by {slope:.4g} for each unit, its norm is {size:.4g}",
            )

    def files(self) -> None:
        """Ask what is written and read."""
        with TemporaryDirectory() as name:
            folder = Path(name) / "adapter"
            with self.promises.keep("Adapter.save", "writes the adapter, and nothing else, into the folder") as promise:
                model, adapter = self.attached()
                adapter.save(folder, "some/base")
                written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                own = sum(p.numel() * p.element_size() for _, p in adapter.named_parameters())
                promise.require(written > 0, "there are no files")
                promise.require(
                    written <= own + OVERHEAD, f"{written:,} bytes for parameters of {own:,} bytes: is the base in it?"
                )
                beside = sorted(path.name for path in Path(name).iterdir() if path != folder)
                promise.require(not beside, f"it also wrote {', '.join(beside)} beside the folder")
            with self.promises.keep("Adapter.load", "reads what save() wrote, bit by bit") as promise:
                other, fresh = self.attached(trained=False)
                fresh.load(folder)
                loaded = dict(fresh.named_parameters())
                lost = [n for n, p in adapter.named_parameters() if not torch.equal(loaded[n], p)]
                promise.require(not lost, f"{len(lost)} of {len(loaded)} parameters differ: {', '.join(lost[:3])}")
                batch = tiny_batch(model, self.every)
                promise.require_close(_logits(other, batch), _logits(model, batch), 1e-6, "logits after loading")
            self._damaged(folder)

    def _damaged(self, folder: Path) -> None:
        text = "raises CheckpointError for missing, unexpected or misshapen tensors, all of them listed"
        with self.promises.keep("Adapter.load", text) as promise:
            _, adapter = self.attached()
            empty = folder.with_name("empty")
            empty.mkdir()
            _faults_of(promise, adapter, empty, "an empty folder")
            files = sorted(folder.rglob("*.safetensors"))
            stored = {path: load_file(path) for path in files}
            path = max(stored, key=lambda one: len(stored[one]), default=None)
            if path is None or len(stored[path]) < 2:
                self.promises.skip("Adapter.load", "damaged tensors: save() wrote no safetensors file with two or more")
                return
            tensors = stored[path]
            missing, misshapen = list(tensors)[:2]
            del tensors[missing]
            tensors[misshapen] = torch.zeros(3, 3, 3)
            tensors[f"{misshapen}.unexpected"] = torch.zeros(2)
            save_file(tensors, path)
            faults = _faults_of(promise, adapter, folder, "three damaged tensors")
            promise.require(len(faults) >= 3, f"three tensors are wrong, it lists {len(faults)}: {'; '.join(faults)}")

    def updates(self) -> None:
        """Ask whether the adapter is the affine update that it says it is."""
        model, adapter = self.attached()
        found: list[AffineUpdate] = []
        whole = True
        for part in PARTS:
            try:
                found += list(adapter.affine_updates(part))
            except NotAffineError as error:
                whole = False
                self.promises.skip("Adapter.affine_updates", f"it says of {part.rstrip('.')}: {error}")
        self._form(model, adapter, found, whole)
        for condition, rows in self._asked(adapter, whole):
            self._compare(model, condition, rows, [u for u in found if u.condition == condition])

    def _asked(self, adapter: Adapter, whole: bool) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Yield conditions and the rows that they stand for, of those that can be compared."""
        for condition in adapter.conditions:
            kinds = {"all": [(TEXT,), (IMAGE,)]}.get(condition, [ROWS[condition]] if condition in ROWS else [])
            if not kinds:
                self.promises.skip("Adapter.affine_updates", f"the kit knows no rows of the condition {condition!r}")
            for rows in kinds:
                if IMAGE not in rows:
                    yield condition, rows
                elif not self.vision:
                    continue
                elif whole:
                    yield condition, rows
                else:
                    self.promises.skip("Adapter.affine_updates", "rows with images: a part of it has no affine form")

    def _form(self, model: MultimodalModel, adapter: Adapter, found: Sequence[AffineUpdate], whole: bool) -> None:
        text = "yields updates [r, in], [out, r] and [out] in fp32, the conditions of a layer together"
        with self.promises.keep("Adapter.affine_updates", text) as promise:
            linears = model.linears()
            for update in found:
                where = f"the update of {update.linear} under {update.condition!r}"
                promise.require(update.linear in linears, f"there is no linear layer {update.linear}")
                promise.require(update.condition in adapter.conditions, f"{where}: conditions are {adapter.conditions}")
                layer = linears[update.linear]
                shapes = [tuple(update.up.shape), tuple(update.down.shape)]
                rank = update.down.shape[0]
                expected = [(layer.out_features, rank), (rank, layer.in_features)]
                promise.require(shapes == expected, f"{where} has up, down of shape {shapes}, not {expected}")
                bias = update.bias
                good = bias is None or tuple(bias.shape) == (layer.out_features,)
                promise.require(good, f"{where} has a bias of shape {bias is not None and list(bias.shape)}")
                parts = [t for t in (update.down, update.up, bias) if t is not None]
                promise.require(all(t.dtype == torch.float32 for t in parts), f"{where} is not in fp32")
            blocks = [name for name, _ in groupby(found, key=lambda update: update.linear)]
            apart = sorted({name for name in blocks if blocks.count(name) > 1})
            promise.require(not apart, f"updates of {', '.join(apart[:3])} do not come together")
            if whole:
                every = [(update.linear, update.condition) for update in adapter.affine_updates()]
                by_part = [(update.linear, update.condition) for update in found]
                same = sorted(every) == sorted(by_part)
                promise.require(same, f"without prefix {len(every)} updates, {len(by_part)} with {' and '.join(PARTS)}")

    def _compare(
        self, model: MultimodalModel, condition: str, rows: tuple[int, ...], updates: Sequence[AffineUpdate]
    ) -> None:
        """Compare the adapted model with one that has the updates folded into its weights."""
        kind = "image" if IMAGE in rows else "text"
        batch, folded = tiny_batch(model, rows), tiny_model(self.vision)
        plain, by_linear = folded.linears(), {name: list(group) for name, group in _by_linear(updates)}
        for name, of_layer in by_linear.items():
            layer = plain[name]
            weight, bias = merged(layer.dequantize(), layer.bias, of_layer)
            folded.replace(name, DenseLinear(weight, bias))
        with _watched(model, batch) as adapted, _watched(folded, batch) as changed:
            logits = _logits(model, batch)
            expected = _logits(folded, batch)
        text = (
            f"yields the exact update of each linear layer: the difference that the adapter makes there, on {kind} rows"
        )
        with self.promises.keep("Adapter.affine_updates", text) as promise:
            for name, seen in changed.items():
                base = plain[name].product(seen.x)
                said = torch.zeros_like(base)
                for update in by_linear.get(name, []):
                    said += seen.x @ update.down.T @ update.up.T + (0.0 if update.bias is None else update.bias)
                difference = adapted[name].y - base
                off = float((difference - said).norm())
                allowed = EXACT * float(said.norm()) + NOISE * float(base.norm())
                promise.require(
                    off <= allowed,
                    f"{name} under {condition!r}: the adapter adds {float(difference.norm()):.4g} (norm), the updates "
                    f"{float(said.norm()):.4g}, and they are {off:.2g} apart, at most {allowed:.2g} is allowed",
                )
        text = f"folded into the weights, give the adapted model's logits on {kind} rows"
        with self.promises.keep("Adapter.affine_updates", text) as promise:
            promise.require_close(expected, logits, EXACT, f"the folded model under {condition!r}")
            moved = relative_error(logits, _logits(tiny_model(self.vision), batch))
            promise.require(
                moved > 10 * EXACT, f"random parameters move the logits by {moved:.2g} only: it does nothing"
            )


def _by_linear(updates: Sequence[AffineUpdate]) -> Any:
    return groupby(updates, key=lambda update: update.linear)


@torch.no_grad()
def _logits(model: MultimodalModel, batch: Batch) -> Tensor:
    return model.logits(model.hidden(batch))


@contextmanager
def _watched(model: MultimodalModel, batch: Batch) -> Any:
    """Yield what passes through the model's linear layers, by the name they had before anything was attached."""
    seen: dict[str, _Seen] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        # in the language model side tokens follow the tokens
        last = batch.tokens if name.startswith("language.") else None

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = _Seen(inputs[0][:, :last], output[:, :last])

        return note

    with ExitStack() as stack:
        for name in model.linears():
            stack.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        yield seen


def _frozen_state(model: MultimodalModel) -> dict[str, Tensor]:
    tensors = {name: parameter.detach().clone() for name, parameter in model.frozen_parameters().items()}
    for name, layer in model.linears().items():
        tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}
    return tensors


def _walk(parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], step: float) -> None:
    with torch.no_grad():
        for parameter, towards in zip(parameters, direction, strict=True):
            parameter.add_(towards, alpha=step)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _faults_of(promise: Promise, adapter: Adapter, folder: Path, what: str) -> tuple[str, ...]:
    """Return the faults that loading ``folder`` tells."""
    try:
        adapter.load(folder)
    except CheckpointError as error:
        return error.faults
    raise AssertionError(promise.broken(f"it loaded {what}"))
