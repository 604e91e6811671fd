"""Small plugins that keep their promises, and others that break one each: what the conformance kit must tell apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavintk.contracts import AffineUpdate
from lavintk.data.records import Message, Record
from lavintk.errors import CheckpointError, DataError, TrainingError
from lavintk.layers import FrozenLinear, PackedWeight, checked_weight
from lavintk.merge import load_on_cpu
from lavintk.models.multimodal import MultimodalModel
from lavintk.run import Run

# Quantizers


class RowLinear(FrozenLinear):
    """Whole numbers from -127 to 127 with a scale for each row."""

    codes: Tensor
    scales: Tensor
    scale_names = ("scales",)

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(codes.shape[0], codes.shape[1], bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes * self.scales[:, None]).to(dtype)

    def packed(self) -> PackedWeight:
        return PackedWeight("rows", (self.out_features, self.in_features), self.codes, self.scales)


class RowQuantizer:
    requires_cuda = False
    layer: type[RowLinear] = RowLinear
    levels = 127

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        weight = checked_weight(weight, bias, "rows").float()
        scales = weight.abs().amax(1).clamp(min=1e-9) / self.levels
        return self.layer((weight / scales[:, None]).round().to(torch.int8), scales, bias)

    def empty(self, out_features: int, in_features: int, bias: bool, device: torch.device) -> FrozenLinear:
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scales = torch.empty(out_features, device=device)
        return self.layer(codes, scales, torch.empty(out_features, device=device) if bias else None)


def row_quantizer(layer: type[RowLinear] = RowLinear, **attributes: Any) -> Callable[[], Any]:
    return type("Quantizer", (RowQuantizer,), {"layer": layer, **attributes})


class WrongGradient(RowLinear):
    def input_gradient(self, gradient: Tensor, total: Tensor | None = None) -> Tensor:
        return super().input_gradient(1.05 * gradient, total)


class NewSum(RowLinear):
    def input_gradient(self, gradient: Tensor, total: Tensor | None = None) -> Tensor:
        own = super().input_gradient(gradient)
        return own if total is None else total + own


class NewTotal(RowLinear):
    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        own = super().product(x)
        return own if total is None else total + own


class WithoutTotal(RowLinear):
    def product(self, x: Tensor, *, wide: bool = False) -> Tensor:  # type: ignore[override]
        return super().product(x)


class WideInHalves(RowLinear):
    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        product = super().product(x, total)
        return product.half() if wide else product


class ForgottenBias(RowLinear):
    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        own = x @ self.dequantize(x.dtype).T
        return own if total is None else total.add_(own)


class WrongType(RowLinear):
    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        return super().product(x.float(), total)


class KeepsWeight(RowLinear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class StateOutside(RowLinear):
    """Keeps its scales where ``state_dict`` does not see them."""

    scale_names = ()

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        FrozenLinear.__init__(self, codes.shape[0], codes.shape[1], bias)
        self.register_buffer("codes", codes)
        self.scales = scales


class CastScales(RowLinear):
    scale_names = ()


class SharedCopy(RowLinear):
    def __deepcopy__(self, memo: dict[int, Any]) -> SharedCopy:
        return type(self)(self.codes, self.scales, self.bias)


class OtherScales(RowLinear):
    def packed(self) -> PackedWeight:
        return PackedWeight("rows", (self.out_features, self.in_features), self.codes, self.scales.roll(1))


class Inverted(RowLinear):
    """Describes its codes by a scheme of its own, which is honest to who knows it."""

    def packed(self) -> PackedWeight:
        shape = (self.out_features, self.in_features)
        return PackedWeight("inverted", shape, -self.codes, self.scales, extra={"sign": -1})


class TrainedScales(RowLinear):
    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        FrozenLinear.__init__(self, codes.shape[0], codes.shape[1], bias)
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().dequantize(dtype).detach()


class WaitsForDevice(RowLinear):
    """Says that it is safe in a CUDA graph, and asks the device for a number."""

    def product(self, x: Tensor, total: Tensor | None = None, *, wide: bool = False) -> Tensor:
        return super().product(x, total) if float(x.abs().sum()) >= 0 else x


QUANTIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong gradient": (row_quantizer(WrongGradient), r"FrozenLinear\.input_gradient.*dense layer's.* off by 0\.05"),
    "a total elsewhere": (row_quantizer(NewTotal), r"FrozenLinear\.product.*adds it to total in place.*another tensor"),
    "no total": (row_quantizer(WithoutTotal), r"FrozenLinear\.product.*adds it to total in place.*TypeError"),
    "wide sums in another type": (
        row_quantizer(WideInHalves),
        r"FrozenLinear\.product.*asked for wide sums, in fp32.*float16 for x in float32",
    ),
    "a sum elsewhere": (row_quantizer(NewSum), r"input_gradient.*adds the gradient to total in place.*another tensor"),
    "no bias": (row_quantizer(ForgottenBias), r"FrozenLinear\.product breaks its promise.*off by 0\.\d+"),
    "the type of the product": (row_quantizer(WrongType), r"FrozenLinear\.product.*float32 for x in float16"),
    "a weight kept": (row_quantizer(KeepsWeight), r"FrozenLinear\.forward.*KeepsWeight overrides it"),
    "state that does not round-trip": (
        row_quantizer(StateOutside),
        r"Quantizer\.empty.*state_dict lacks something",
    ),
    "scales that are cast": (row_quantizer(CastScales), r"scale_names.*after \.to\(bfloat16\) is off by"),
    "a copy that shares": (row_quantizer(SharedCopy), r"the copy is independent.*zeroing a deep copy changed"),
    "dishonest packed": (
        row_quantizer(OtherScales),
        r"FrozenLinear\.packed.*off by .*scheme 'rows'",
    ),
    "a trained base": (row_quantizer(TrainedScales), r"gives no gradient to the base.*it has parameters: scales"),
    "too coarse": (row_quantizer(levels=3), r"FrozenLinear\.dequantize.*off by 0\.\d+ of its size, at most 0\.2"),
}

# Optimizers


class Momentum(torch.optim.Optimizer):
    """Descent with momentum and decoupled weight decay."""

    by_norm, sign = False, 1

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    def rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])

    def decay(self, group: dict[str, Any]) -> float:
        return float(group["weight_decay"])

    def memory(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average: Tensor = state["average"]
        return average

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if self.by_norm:
                    gradient = gradient / (1e-3 * gradient.norm() + 1)
                average = self.memory(parameter).mul_(0.5).add_(gradient)
                parameter.mul_(1 - self.rate(group) * self.decay(group)).sub_(self.sign * self.rate(group) * average)


class NormedMomentum(Momentum):
    by_norm = True


class ForgetfulMomentum(Momentum):
    """Keeps its averages beside the state."""

    def memory(self, parameter: nn.Parameter) -> Tensor:
        averages = self.__dict__.setdefault("averages", {})
        return averages.setdefault(id(parameter), torch.zeros_like(parameter))  # type: ignore[no-any-return]


class OwnRate(Momentum):
    def rate(self, group: dict[str, Any]) -> float:
        return float(self.defaults["lr"])


class OneDecay(Momentum):
    def decay(self, group: dict[str, Any]) -> float:
        return 0.1


class Climber(Momentum):
    sign = -1


class MomentumOptimizer:
    paged, state_bits, without_cuda, elementwise = False, 32, "", True
    kind: type[Momentum] = Momentum

    def build(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: Any, eps: float) -> torch.optim.Optimizer:
        return self.kind([dict(group) for group in groups], lr)


class RefusesCpu(MomentumOptimizer):
    def build(self, groups: Any, *, lr: float, betas: Any, eps: float) -> torch.optim.Optimizer:
        raise TrainingError("only on CUDA")


def momentum(kind: type[Momentum] = Momentum, **attributes: Any) -> Callable[[], Any]:
    return type("Optimizer", (MomentumOptimizer,), {"kind": kind, **attributes})


OPTIMIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "state that does not round-trip": (
        momentum(ForgetfulMomentum),
        r"goes on identically.*1 steps on",
    ),
    "its own rate": (momentum(OwnRate), r"takes the learning rate that the schedule sets.*lr set to 0 moves"),
    "one decay for all": (momentum(OneDecay), r"its own weight_decay.*weight_decay 0 and no gradient moved by"),
    "the wrong way": (momentum(Climber), r"converges on a quadratic.*is left with"),
    "more memory than it says": (momentum(state_bits=8), r"state_bits.*takes: 8.*has 32"),
    "not elementwise": (momentum(NormedMomentum), r"Optimizer\.elementwise.*declare elementwise = False"),
    "silent about pages": (momentum(paged=True), r"without_cuda.*it is empty, but the state is paged"),
    "silent about the CPU": (RefusesCpu, r"without_cuda.*it is empty, and build\(\) raised: only on CUDA"),
}

# Adapters


class ShiftLinear(nn.Module):
    """A layer with a trained shift and a trained direction: ``y = base(x) + up (down x) + shift``."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.zeros(base.out_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, 1))
        self.down = nn.Parameter(torch.full((1, base.in_features), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + (x @ self.down.T.to(x.dtype)) @ self.up.T.to(x.dtype) + self.shift.to(x.dtype)


class ShiftAdapter:
    """Shifts the queries of the language model."""

    conditions: tuple[str, ...] = ("all",)

    def __init__(self) -> None:
        self.layers: dict[str, ShiftLinear] = {}

    def attach(self, model: MultimodalModel) -> None:
        for name, layer in model.linears().items():
            if name.startswith("language.") and name.endswith("q_proj"):
                self.layers[name] = ShiftLinear(layer)
                model.replace(name, self.layers[name])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.layers.items():
            for part in ("shift", "up", "down"):
                yield f"{name}.{part}", getattr(layer, part)

    def side_tokens(self) -> Tensor | None:
        return None

    def save(self, folder: Path, base: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach() for name, p in self.named_parameters()}, folder / "shift.safetensors")

    def load(self, folder: Path) -> None:
        if not (folder / "shift.safetensors").is_file():
            raise CheckpointError(str(folder), ["shift.safetensors is missing"])
        stored, own = load_file(folder / "shift.safetensors"), dict(self.named_parameters())
        faults = [f"{name} is missing" for name in own.keys() - stored.keys()]
        faults += [f"{name} is unexpected" for name in stored.keys() - own.keys()]
        faults += [f"{n} has another shape" for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape]
        if faults:
            raise CheckpointError(str(folder), faults)
        for name, parameter in own.items():
            parameter.data.copy_(stored[name])

    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        for name, layer in self.layers.items():
            if name.startswith(prefix):
                yield AffineUpdate(name, "all", layer.down.detach(), layer.up.detach(), layer.shift.detach())


class StartsShifted(ShiftAdapter):
    def attach(self, model: MultimodalModel) -> None:
        super().attach(model)
        for layer in self.layers.values():
            layer.shift.data.fill_(0.5)


class TrainsBase(ShiftAdapter):
    def attach(self, model: MultimodalModel) -> None:
        super().attach(model)
        model.language.model.norm.weight.requires_grad_(True)


class WrongScale(ShiftAdapter):
    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        for update in super().affine_updates(prefix):
            yield AffineUpdate(update.linear, "all", update.down, 2 * update.up, update.bias)


class NoBias(ShiftAdapter):
    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        for update in super().affine_updates(prefix):
            yield AffineUpdate(update.linear, "all", update.down, update.up)


class HalfUpdates(ShiftAdapter):
    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        for update in super().affine_updates(prefix):
            yield AffineUpdate(update.linear, "all", update.down.half(), update.up.half(), update.bias)


class IgnoresPrefix(ShiftAdapter):
    def affine_updates(self, prefix: str = "") -> Iterator[AffineUpdate]:
        return super().affine_updates()


class SavesHalf(ShiftAdapter):
    def save(self, folder: Path, base: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().bfloat16() for n, p in self.named_parameters()}, folder / "shift.safetensors")


class SavesBase(ShiftAdapter):
    def save(self, folder: Path, base: str) -> None:
        super().save(folder, base)
        save_file({n: layer.base.dequantize() for n, layer in self.layers.items()}, folder / "base.safetensors")
        save_file({"more": torch.zeros(32_000)}, folder / "more.safetensors")


class LoadsAnything(ShiftAdapter):
    def load(self, folder: Path) -> None:
        try:
            super().load(folder)
        except CheckpointError as error:
            if len(error.faults) == 1:
                raise


class DeadWeight(ShiftAdapter):
    def attach(self, model: MultimodalModel) -> None:
        super().attach(model)
        self.idle = nn.Parameter(torch.zeros(3))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters()
        yield "idle", self.idle


class NeverStarts(ShiftAdapter):
    def attach(self, model: MultimodalModel) -> None:
        super().attach(model)
        for layer in self.layers.values():
            layer.down.data.zero_()
            layer.shift = nn.Parameter(torch.zeros(0))
            layer.forward = lambda x, layer=layer: layer.base(x) + x @ layer.down.T @ layer.up.T  # type: ignore[method-assign]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in super().named_parameters() if not name.endswith("shift"))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class WrongAdapterGradient(ShiftAdapter):
    def attach(self, model: MultimodalModel) -> None:
        super().attach(model)
        for layer in self.layers.values():
            layer.forward = lambda x, layer=layer: (  # type: ignore[method-assign]
                layer.base(x) + (x @ layer.down.T) @ layer.up.T + _Reversed.apply(layer.shift)
            )


class TwoConditions(ShiftAdapter):
    conditions = ("text", "image")

    def side_tokens(self) -> Tensor | None:
        return torch.zeros(3, 64)


ADAPTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "not the identity": (StartsShifted, r"Adapter\.attach.*changes no output at the start.*off by"),
    "trains the base": (TrainsBase, r"1 other parameters get a gradient: language\.model\.norm\.weight"),
    "an update of another size": (
        WrongScale,
        r"under 'all': the adapter adds [\d.]+ \(norm\), the updates [\d.]+",
    ),
    "an update without its bias": (NoBias, r"the difference that the adapter makes there"),
    "updates in fp16": (HalfUpdates, r"Adapter\.affine_updates.*is not in fp32"),
    "no regard for the prefix": (IgnoresPrefix, r"Adapter\.affine_updates.*(do not come together|without prefix)"),
    "files that round": (SavesHalf, r"reads what save\(\) wrote, bit by bit.*parameters differ"),
    "the base in its files": (SavesBase, r"Adapter\.save.*is the base in it\?"),
    "damaged files accepted": (LoadsAnything, r"Adapter\.load.*it loaded three damaged tensors"),
    "a dead parameter": (DeadWeight, r"all of it trains.*gradient reaches 1 of 7: idle"),
    "a start that cannot move": (NeverStarts, r"can be trained from the start.*none of its 4 parameters"),
    "a wrong gradient": (WrongAdapterGradient, r"get the gradient of the loss.*the loss rises by"),
    "side tokens of another number": (TwoConditions, r"Adapter\.side_tokens.*\[3, 64\], not \[2, 64\]"),
}

# Exporters


class WeightsExporter:
    """Writes the folded linear layers as one safetensors file."""

    def export(self, run: Run, out: Path) -> None:
        from lavintk.merge import merged_linears

        model = load_on_cpu(run).model
        save_file({linear.name: linear.weight for linear in merged_linears(model, "all")}, out / "weights.safetensors")

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        return sum(4 * layer.out_features * layer.in_features for layer in outline.linears().values())


class WritesBeside(WeightsExporter):
    def export(self, run: Run, out: Path) -> None:
        super().export(run, out)
        (out.parent / "notes.txt").write_text("done")


class WritesIntoRun(WeightsExporter):
    def export(self, run: Run, out: Path) -> None:
        super().export(run, out)
        (run.folder / "exported.txt").write_text("done")


class NamesFolder(WeightsExporter):
    def export(self, run: Run, out: Path) -> None:
        super().export(run, out)
        (out / "index.json").write_text(json.dumps({"weights": str(out / "weights.safetensors")}))


class WantsTooMuch(WeightsExporter):
    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        return 2 * super().bytes_needed(run, outline)


class Crashes(WeightsExporter):
    def export(self, run: Run, out: Path) -> None:
        if not (run.folder / "model").is_dir():
            raise KeyError("model")
        super().export(run, out)


class WritesNothing:
    def export(self, run: Run, out: Path) -> None:
        return


EXPORTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (WritesNothing, r"Exporter\.export.*there are no files in it"),
    "files beside the folder": (WritesBeside, r"nothing outside of it.*it also wrote notes\.txt"),
    "files in the run": (WritesIntoRun, r"in the run's own folder exported\.txt changed"),
    "the folder's first name": (NamesFolder, r"can be moved.*index\.json names the folder it was written in"),
    "too many bytes": (WantsTooMuch, r"SizedExporter\.bytes_needed.*it says [\d,]+, the folder has [\d,]+ bytes"),
    "a crash": (Crashes, r"raises a LavintkError for a run that it cannot express.*it raised KeyError: 'model'"),
}

# Datasets


class LinesFormat:
    """JSON lines ``{"id", "ask", "answer"}``."""

    first = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, split: str) -> list[Record]:
        if not self.path.is_file():
            raise DataError(str(self.path), ["no such file"])
        records, faults = list[Record](), list[str]()
        for number, line in enumerate(self.path.read_text().splitlines(), self.first):
            try:
                records.append(self.record(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                self.note(faults, f"line {number}: {error}")
        if faults:
            raise DataError(str(self.path), faults)
        return records

    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], (Message("user", row["ask"]), Message("assistant", row["answer"])))

    def note(self, faults: list[str], fault: str) -> None:
        faults.append(fault)


class WithoutMasks(LinesFormat):
    """Writes question and answer into one message."""

    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], (Message("user", f"{row['ask']} {row['answer']}"),))


class TrainsQuestions(LinesFormat):
    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], (Message("assistant", f"{row['ask']} {row['answer']}"),))


class OneId(LinesFormat):
    def record(self, row: dict[str, str]) -> Record:
        return Record("row" if row["id"] else "", super().record(row).messages)


class UnknownRole(LinesFormat):
    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], (Message("human", row["ask"]), Message("assistant", row["answer"])))  # type: ignore[arg-type]


class FirstFaultOnly(LinesFormat):
    def note(self, faults: list[str], fault: str) -> None:
        raise DataError(str(self.path), [fault])


class SkipsBadRows(LinesFormat):
    def note(self, faults: list[str], fault: str) -> None:
        return


class CountsFromZero(LinesFormat):
    first = 0


class CrashesOnRows(LinesFormat):
    def note(self, faults: list[str], fault: str) -> None:
        raise KeyError("ask")


class CrashesOnFiles(LinesFormat):
    def load(self, split: str) -> list[Record]:
        self.path.read_text()
        return super().load(split)


class LostImage(LinesFormat):
    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], super().record(row).messages, (self.path.with_name("none.png"),))


class LostMarker(LinesFormat):
    def record(self, row: dict[str, str]) -> Record:
        return Record(row["id"], (Message("user", f"<image>{row['ask']}"), Message("assistant", row["answer"])))


class AnotherOrder(LinesFormat):
    calls = 0

    def load(self, split: str) -> list[Record]:
        AnotherOrder.calls += 1
        return super().load(split)[:: 1 if AnotherOrder.calls % 2 else -1]


DATASETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no masks": (WithoutMasks, r"Record\.messages.*has no trained token; its last message is the user's"),
    "questions that are trained": (TrainsQuestions, r"Record\.messages.*has no user message with text"),
    "one id for all": (OneId, r"Record\.id.*'row' stands for more than one record"),
    "an unknown role": (UnknownRole, r"record 'a': message 0 has the role 'human'"),
    "the first fault only": (FirstFaultOnly, r"every bad row.*line 2 is no JSON, and no fault names it"),
    "bad rows left out": (SkipsBadRows, r"raises one DataError with every bad row.*it returned \d+ records instead"),
    "lines counted from 0": (CountsFromZero, r"line 3 is an object without fields, and no fault names it"),
    "a crash on a bad row": (CrashesOnRows, r"every bad row.*it raised KeyError"),
    "a crash on a missing file": (CrashesOnFiles, r"a file that is not there.*it raised FileNotFoundError"),
    "an image that is not there": (LostImage, r"Record\.images.*record 'a': an image cannot be read"),
    "a marker without an image": (LostMarker, r"record 'a' has 1 markers and 0 images"),
    "another order each time": (AnotherOrder, r"the same each time.*they are not equal"),
}
