"""What :func:`lavintk.testing.check_quantizer` asks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from lavintk.contracts import CalibratedQuantizer, Quantizer
from lavintk.errors import LavintkError
from lavintk.layers import FLOATS, FrozenLinear, PackedWeight
from lavintk.testing.outcome import Report
from lavintk.testing.packed import unpacked
from lavintk.testing.promises import Promises, class_name, relative_error

SHAPE = (96, 192)
"""Out and in features: whole blocks for every common block size up to 64."""
ODD_SHAPES = ((24, 100), (5, 7), (16, 40))
"""Shapes that a quantizer may refuse, but not get wrong."""
PRODUCT_ERROR, GRADIENT_ERROR = 0.03, 0.015
"""Relative errors that are allowed: LLM.int8() rounds the inputs too, bf16 every value to 2^-9."""
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far a weight rounded once to a type may be from the fp32 one, relative."""
PACKED_ERROR = 2e-6


Unpack = Callable[[PackedWeight], Tensor]


def check(make: Callable[[], Quantizer], max_error: float, unpack: Unpack | None) -> Report:
    """See :func:`lavintk.testing.check_quantizer`."""
    quantizer = make()
    promises = Promises(class_name(quantizer))
    with promises.keep("Quantizer.requires_cuda", "says True or False") as promise:
        promise.require(isinstance(quantizer.requires_cuda, bool), f"it is {quantizer.requires_cuda!r}")
    devices = [] if quantizer.requires_cuda else ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    elif quantizer.requires_cuda:
        import pytest

        pytest.skip(f"{class_name(quantizer)} requires CUDA, and torch {torch.__version__} sees no device")
    else:
        promises.skip("FrozenLinear on CUDA", f"torch {torch.__version__} sees no CUDA device")
        promises.skip("FrozenLinear.graph_safe", "whether it is honest shows in the capture of a CUDA graph only")
    for device in devices:
        _Questions(promises, make, torch.device(device), unpack or unpacked).ask(max_error)
    return promises.report()


class _Questions:
    """What is asked of a quantizer on one device."""

    def __init__(self, promises: Promises, make: Callable[[], Quantizer], device: torch.device, unpack: Unpack) -> None:
        self.promises, self.quantizer, self.device, self.unpack = promises, make(), device, unpack
        self._random = torch.Generator().manual_seed(0)
        self.weight, self.bias = self.normal(*SHAPE), self.normal(SHAPE[0])
        self.x = self.normal(2, 3, SHAPE[1])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(self.device)

    def ask(self, max_error: float) -> None:
        layer = self._quantize()
        self._round_trip(max_error)
        self._number_types(layer)
        self._rows(layer)
        self._product(layer)
        self._gradient(layer)
        self._base_stays(layer)
        self._sum_of_gradients(layer)
        self._packed(layer)
        self._state(layer)
        self._copy(layer)
        self._moves(layer)
        self._odd_shapes(max_error)
        self._calibrated()
        if self.device.type == "cuda":
            self._graph(layer)

    def _quantize(self) -> FrozenLinear:
        text = "returns a frozen layer of the weight's shape and device, with the bias in its own type"
        with self.promises.keep("Quantizer.quantize", text) as promise:
            weight = self.weight.clone()
            layer = self.quantizer.quantize(weight, self.bias.to(torch.float16))
            promise.require(isinstance(layer, FrozenLinear), f"it is a {class_name(layer)}")
            promise.require(torch.equal(weight, self.weight), "the weight that was given has changed")
            shape = (layer.out_features, layer.in_features)
            promise.require(shape == SHAPE, f"out_features, in_features are {shape} for a weight {SHAPE}")
            elsewhere = {str(b.device) for b in layer.buffers() if b.device.type != self.device.type}
            promise.require(not elsewhere, f"buffers on {', '.join(sorted(elsewhere))}, the weight is on {self.device}")
            bias = layer.bias
            found = "no bias" if bias is None else str(bias.dtype)
            promise.require(bias is not None and bias.dtype == torch.float16, f"{found} for a bias in float16")
            promise.require(bias is not None and torch.equal(bias, self.bias.half()), "the bias has other values")
            promise.require(
                self.quantizer.quantize(self.weight, None).bias is None, "a layer without a bias has got one"
            )
            return self.quantizer.quantize(self.weight, self.bias)

    def _round_trip(self, max_error: float) -> None:
        text = f"is near the weight: relative error at most {max_error:g} for normally distributed ones"
        with self.promises.keep("FrozenLinear.dequantize", text) as promise:
            for dtype in FLOATS:
                quantized = self.quantizer.quantize(self.weight.to(dtype), None).dequantize()
                promise.require_close(quantized, self.weight.to(dtype), max_error, f"a weight given in {_name(dtype)}")
            weight = torch.zeros_like(self.weight)
            weight[::2] = self.weight[::2] * 1e-3
            zeros = self.quantizer.quantize(weight, None).dequantize()
            promise.require_close(zeros, weight, max_error, "a weight with rows of zeros")

    def _number_types(self, layer: FrozenLinear) -> None:
        text = "gives one weight [out, in], in the type that is asked for"
        with self.promises.keep("FrozenLinear.dequantize", text) as promise:
            exact = layer.dequantize()
            for dtype in FLOATS:
                found = layer.dequantize(dtype)
                promise.require(found.dtype == dtype, f"{_name(found.dtype)} instead of {_name(dtype)}")
                promise.require_close(found.float(), exact, ROUNDING[dtype], f"the weight in {_name(dtype)}")
                promise.require(not found.requires_grad, "it requires a gradient")

    def _rows(self, layer: FrozenLinear) -> None:
        text = "returns rows of the weight of dequantize(), bit for bit"
        with self.promises.keep("FrozenLinear.rows", text) as promise:
            index = torch.tensor([SHAPE[0] - 1, 0, 1, 0], device=self.device)
            for dtype in FLOATS:
                found = layer.rows(index, dtype)
                promise.require(found.dtype == dtype, f"{_name(found.dtype)} instead of {_name(dtype)}")
                promise.require(torch.equal(found, layer.dequantize(dtype)[index]), f"other values in {_name(dtype)}")

    def _product(self, layer: FrozenLinear) -> None:
        text = "computes x @ W.T + b with the weight of dequantize(), in the type of x, as a new tensor"
        with self.promises.keep("FrozenLinear.product", text) as promise:
            for dtype in FLOATS:
                x, weight = self.x.to(dtype), layer.dequantize(torch.float32)
                expected = F.linear(x.float(), weight, self.bias)
                for shaped in (x, x[0, 0], x[:0]):
                    found = layer.product(shaped)
                    shape = (*shaped.shape[:-1], layer.out_features)
                    promise.require(tuple(found.shape) == shape, f"shape {tuple(found.shape)} instead of {shape}")
                    promise.require(found.dtype == dtype, f"{_name(found.dtype)} for x in {_name(dtype)}")
                    promise.require(found.is_contiguous(), "it is not contiguous")
                promise.require_close(layer.product(x).float(), expected, PRODUCT_ERROR, f"it in {_name(dtype)}")
                promise.require_close(layer(x).float(), expected, PRODUCT_ERROR, f"forward() in {_name(dtype)}")
        text = "adds it to total in place and returns that, if given one"
        with self.promises.keep("FrozenLinear.product", text) as promise:
            for dtype in FLOATS:
                x, begun = self.x.to(dtype), self.normal(2, 3, SHAPE[0]).to(dtype)
                expected, total = begun.float() + layer.product(x).float(), begun.clone()
                promise.require(layer.product(x, total) is total, "it returned another tensor")
                promise.require_close(total.float(), expected, PRODUCT_ERROR, f"the sum in {_name(dtype)}")
        text = "computes it in the type of x or, asked for wide sums, in fp32"
        with self.promises.keep("FrozenLinear.product", text) as promise:
            for dtype in FLOATS:
                x = self.x.to(dtype)
                found = layer.product(x, wide=True)
                promise.require(found.dtype in (dtype, torch.float32), f"{_name(found.dtype)} for x in {_name(dtype)}")
                expected = layer.product(x).float()
                promise.require_close(found.float(), expected, PRODUCT_ERROR, f"the sums in {_name(dtype)}")
        text = "is left alone by subclasses, since adapters build on product() and input_gradient()"
        with self.promises.keep("FrozenLinear.forward", text) as promise:
            promise.require(type(layer).forward is FrozenLinear.forward, f"{class_name(layer)} overrides it")

    def _gradient(self, layer: FrozenLinear) -> None:
        text = "is gradient @ W with the weight of dequantize()"
        with self.promises.keep("FrozenLinear.input_gradient", text) as promise:
            for dtype in FLOATS:
                x, flow = self.x.to(dtype, copy=True).requires_grad_(), self.normal(2, 3, SHAPE[0]).to(dtype)
                layer(x).backward(flow)
                assert x.grad is not None
                reference = self.x.clone().requires_grad_()
                F.linear(reference, layer.dequantize(), self.bias).backward(flow.float())
                assert reference.grad is not None
                what = f"the gradient to x in {_name(dtype)}, against a dense layer's,"
                promise.require_close(x.grad.float(), reference.grad, GRADIENT_ERROR, what)
                promise.require(x.grad.dtype == dtype, f"{_name(x.grad.dtype)} for x in {_name(dtype)}")

    def _base_stays(self, layer: FrozenLinear) -> None:
        text = "gives no gradient to the base and keeps no weight for the backward pass"
        with self.promises.keep("FrozenLinear", text) as promise:
            trained = [name for name, _ in layer.named_parameters()]
            promise.require(not trained, f"it has parameters: {', '.join(trained)}")
            tracked = [name for name, buffer in layer.named_buffers() if buffer.requires_grad]
            promise.require(not tracked, f"buffers require a gradient: {', '.join(tracked)}")
            promise.require(not layer(self.x).requires_grad, "the product of an x without gradient requires one")
            kept: list[int] = []
            before = _state_of(layer)

            def note(tensor: Tensor) -> Tensor:
                kept.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                product = layer(self.x.clone().requires_grad_())
            product.sum().backward()
            weight = SHAPE[0] * SHAPE[1]
            promise.require(
                max(kept, default=0) < weight, f"it keeps {max(kept, default=0)} elements, as W has {weight}"
            )
            promise.require(_same(before, _state_of(layer)), "its storage changed in a forward and backward pass")

    def _sum_of_gradients(self, layer: FrozenLinear) -> None:
        text = "adds the gradient to total in place and returns it"
        with self.promises.keep("FrozenLinear.input_gradient", text) as promise:
            flow, total = self.normal(2, 3, SHAPE[0]), self.normal(2, 3, SHAPE[1])
            expected = total + layer.input_gradient(flow)
            found = layer.input_gradient(flow, total)
            promise.require(found is total, "it returned another tensor")
            promise.require_close(found, expected, GRADIENT_ERROR, "the sum")

    def _packed(self, layer: FrozenLinear) -> None:
        text = "describes the storage, so that an exporter reads the weight of dequantize() out of it"
        with self.promises.keep("FrozenLinear.packed", text) as promise:
            packed = layer.packed()
            promise.require(packed.shape == SHAPE, f"its shape is {packed.shape}, the layer's {SHAPE}")
            scales = packed.scales
            promise.require(
                scales is None or scales.dtype == torch.float32, f"scales in {getattr(scales, 'dtype', '')}"
            )
            own = f"scheme {packed.scheme!r}, layout {packed.layout!r}, block_size {packed.block_size}"
            try:
                found = self.unpack(packed)
            except (ValueError, RuntimeError, IndexError) as error:
                raise AssertionError(promise.broken(f"{error} ({own})")) from error
            off = relative_error(found, layer.dequantize())
            promise.require(
                off <= PACKED_ERROR,
                f"codes, codebook, zero points and scales give a weight that is off by {off:.2g} of its size ({own}); "
                "if the scheme means something else, give unpack= to the check",
            )

    def _state(self, layer: FrozenLinear) -> None:
        text = "returns a layer into which a state_dict loads bit by bit"
        with self.promises.keep("Quantizer.empty", text) as promise:
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            with _undefined_content():
                loaded = self.quantizer.empty(*SHAPE, True, self.device)
            promise.require(isinstance(loaded, FrozenLinear), f"it is a {class_name(loaded)}")
            loaded.load_state_dict(torch.load(file, weights_only=True, map_location=self.device), assign=True)
            promise.require(_same(_state_of(layer), _state_of(loaded)), "buffers differ after loading")
            differ = int((loaded.dequantize() != layer.dequantize()).sum())
            promise.require(
                differ == 0, f"{differ} of {SHAPE[0] * SHAPE[1]} weights differ: the state_dict lacks something"
            )
            x = self.x
            promise.require(torch.equal(loaded(x), layer(x)), "the same x gives another product after loading")
            promise.require(self.quantizer.empty(*SHAPE, False, self.device).bias is None, "bias=False gave a bias")

    def _copy(self, layer: FrozenLinear) -> None:
        text = "can be copied, and the copy is independent"
        with self.promises.keep("FrozenLinear", text) as promise:
            before, duplicate = layer.dequantize().clone(), copy.deepcopy(layer)
            promise.require(torch.equal(duplicate.dequantize(), before), "a deep copy has another weight")
            for buffer in duplicate.buffers():
                buffer.zero_()
            promise.require(torch.equal(layer.dequantize(), before), "zeroing a deep copy changed the layer")

    def _moves(self, layer: FrozenLinear) -> None:
        text = "moves between devices and number types; buffers in scale_names keep their type"
        with self.promises.keep("FrozenLinear.scale_names", text) as promise:
            before, quantized = layer.dequantize(), not layer.packed().codes.is_floating_point()
            for dtype in (torch.bfloat16, torch.float16):
                found = copy.deepcopy(layer).to(dtype).dequantize()
                limit = 0.0 if quantized else ROUNDING[dtype]
                promise.require_close(found, before, limit, f"the weight after .to({_name(dtype)})")
                missing = set(layer.scale_names) - set(dict(layer.named_buffers()))
                absent = {name for name in missing if not hasattr(layer, name)}
                promise.require(not absent, f"there is no buffer {', '.join(sorted(absent))}")
            if self.device.type == "cuda" and not self.quantizer.requires_cuda:
                moved = copy.deepcopy(layer).cpu()
                promise.require_close(moved.dequantize(), before, 1e-6, "the weight after .cpu()")
                promise.require_close(moved.cuda().dequantize(), before, 0.0, "the weight after .cpu().cuda()")
                promise.require_close(moved.cpu()(self.x.cpu()), layer(self.x), PRODUCT_ERROR, "the product on the CPU")

    def _odd_shapes(self, max_error: float) -> None:
        text = "refuses a shape that it does not support with a LavintkError, and gets the others right"
        with self.promises.keep("Quantizer.quantize", text) as promise:
            for shape in ODD_SHAPES:
                weight = self.normal(*shape)
                try:
                    layer = self.quantizer.quantize(weight, None)
                except LavintkError:
                    continue
                promise.require_close(layer.dequantize(), weight, 1.5 * max_error, f"a weight {shape}")
                x = self.normal(2, shape[1])
                promise.require_close(layer(x), F.linear(x, layer.dequantize()), PRODUCT_ERROR, f"the product {shape}")
                error = relative_error(self.unpack(layer.packed()), layer.dequantize())
                promise.require(error <= PACKED_ERROR, f"packed() of a weight {shape} is off by {error:.2g}")

    def _calibrated(self) -> None:
        if not isinstance(self.quantizer, CalibratedQuantizer):
            return
        text = "makes no output's squared error larger than quantize() does on these inputs"
        with self.promises.keep("CalibratedQuantizer.quantize_calibrated", text) as promise:
            x = self.normal(64, SHAPE[1]) @ self.normal(SHAPE[1], SHAPE[1])
            moment = x.T @ x
            before = moment.clone()
            layers = (
                self.quantizer.quantize(self.weight, self.bias),
                self.quantizer.quantize_calibrated(self.weight, self.bias, moment),
            )
            plain, calibrated = (
                (F.linear(x, layer.dequantize() - self.weight).double() ** 2).sum(0) for layer in layers
            )
            worse = int((calibrated > plain * 1.001).sum())
            promise.require(worse == 0, f"{worse} of {SHAPE[0]} outputs have a larger error")
            promise.require(torch.equal(moment, before), "the second moment has changed")

    def _graph(self, layer: FrozenLinear) -> None:
        if not layer.graph_safe:
            self.promises.skip("FrozenLinear.graph_safe", "it says no, so no capture was tried")
            return
        text = "forward and backward pass can be captured in a CUDA graph"
        with self.promises.keep("FrozenLinear.graph_safe", text) as promise:
            x, flow = self.x.clone().requires_grad_(), self.normal(2, 3, SHAPE[0])

            def both() -> tuple[Tensor, Tensor]:
                product = layer(x)
                return product, torch.autograd.grad(product, x, flow)[0]

            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                both()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                product, gradient = both()
            x.data.copy_(self.normal(2, 3, SHAPE[1]))
            graph.replay()
            torch.cuda.synchronize()
            expected = both()
            promise.require_close(product, expected[0], 1e-5, "a replayed product")
            promise.require_close(gradient, expected[1], 1e-5, "a replayed gradient")


@contextmanager
def _undefined_content() -> Iterator[None]:
    """Let ``torch.empty`` give NaN, or the largest whole number: memory used before may hold the right values."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _state_of(layer: FrozenLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names, types and bits are the same."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
