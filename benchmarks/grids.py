"""How exactly four-bit grids hold weights, and what that does to a model.

    python benchmarks/grids.py [--model smollm2-135m-instruct] [--grid int4:search=mse --grid nf4]

Left: the relative error ``|W - W'| / |W|`` of random matrices, normally distributed and heavy-tailed (Student's t with
5 and with 3 degrees of freedom), and of the model's own linear weights. Right: what the model with quantized linear
layers says about the text below, beside the model in fp32: the mean Kullback-Leibler divergence of the predicted
distributions in nats, the share of equal first choices, and the perplexity. Where the package ``hqq`` can be imported,
its error of the random matrices comes first; it keeps fractional zero points, which ONNX Runtime's blocks do not.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lavintk.contracts import Quantizer
from lavintk.devices import describe, pick_device
from lavintk.layers import FrozenLinear
from lavintk.models.catalog import locate
from lavintk.models.language import load_language_model
from lavintk.models.sources import WeightSource, open_source
from lavintk.models.tokenizer import load_tokenizer
from lavintk.plugins import installed_plugins
from lavintk.registry import Choice

GRIDS = (
    "int4:search=none", "int4:search=mse", "int4:search=balanced", "int4:search=hqq", "int4:search=none,block_size=64",
    "int4:search=balanced,block_size=64", "nf4", "nf4:block_size=32,double_quant=false",
)  # fmt: skip
SHAPE = (1024, 2048)
"""Of the random matrices."""
TEXT = """\
The harbour town wakes before the sun does. Long before the first bus climbs the hill, lights appear in the bakery \
behind the church, and the smell of bread drifts down to the boats. The fishermen have already left by then. They \
know the channel so well that they steer through it in the dark, counting the seconds between the two buoys and \
listening for the bell on the outer rocks. When the fog is thick they go out all the same, a little slower, with one \
man standing at the bow and a lamp in his hand.

My grandmother used to say that you could tell the weather by the way the gulls sat on the roof of the customs house. \
If they all faced the sea, the wind would turn by noon. If they sat apart and would not look at one another, there \
would be rain. I wrote her predictions into a notebook for a whole summer, and at the end of August I counted: she \
had been right on fifty-one days out of seventy. The radio, which I had also written down, was right on forty-nine. \
She was not surprised. She only asked whether I had counted the day of the wedding, when it rained on everything \
except the bride.

A good measurement begins with the question of what would change your mind. Suppose that you want to know whether a \
new road has made a village quieter. You could ask the people who live there, but they remember the summer better \
than the winter, and they remember the complaint better than the cause. You could place a microphone by the old road, \
but then you would learn about one place and one week. It is better to decide beforehand how loud is loud, to choose \
the days by lot, and to write down what you expect before you look. Most of the work is done by the time the first \
number arrives.

Water boils at a lower temperature on a mountain because the air above it is thinner and presses less on its surface. \
At three thousand metres it boils at about ninety degrees, so potatoes take longer to cook there, and tea tastes \
weak. Inside a pressure cooker the opposite happens: the steam cannot escape, the pressure rises, and the water gets \
hotter than one hundred degrees before it boils. The same law explains why a bottle of lemonade foams when it is \
opened.

The library closed at six, but the old man at the desk never asked anyone to leave before half past. He went round \
with a small trolley, put the newspapers back in order, watered the fern, and turned the lamps off one by one, \
beginning with the far end of the room, so that the last reader sat in a little island of light.
"""
"""Written for this measurement, so that no model has seen it."""


@dataclass
class Outcome:
    """What was measured on one grid."""

    bits: float
    weight_error: float
    divergence: float
    agreement: float
    perplexity: float
    seconds: float


def random_matrices() -> dict[str, Tensor]:
    """Return a matrix of each distribution, the same ones in every run."""
    torch.manual_seed(0)
    return {
        "normal": torch.randn(SHAPE),
        "Student t": torch.distributions.StudentT(5.0).sample(SHAPE),
        "Student t, 3": torch.distributions.StudentT(3.0).sample(SHAPE),
    }


def relative_error(quantizer: Quantizer, weight: Tensor) -> float:
    """Return ``|W - W'| / |W|``."""
    return float((quantizer.quantize(weight, None).dequantize() - weight).norm() / weight.norm())


def hqq_error(weight: Tensor, block_size: int, whole_zeros: bool) -> float:
    """Return ``|W - W'| / |W|`` of the HQQ package's 4 bits, blocks along the rows.

    :param whole_zeros: round its zero points and round the weights once more on that grid, as ``MatMulNBits`` needs it.
    """
    from hqq.core.quantize import Quantizer as HalfQuadratic

    codes, meta = HalfQuadratic.quantize(
        weight, nbits=4, group_size=block_size, axis=1, bitpack=False, compute_dtype=torch.float32, device="cpu"
    )
    blocks, scale, zero = weight.reshape(-1, block_size), meta["scale"], meta["zero"]
    if whole_zeros:
        zero = zero.round().clamp(0, 15)
        codes = (blocks / scale + zero).round().clamp(0, 15)
    found = ((codes.reshape(blocks.shape).float() - zero) * scale).view_as(weight)
    return float((found - weight).norm() / weight.norm())


def print_hqq(matrices: dict[str, Tensor]) -> None:
    """Print what the HQQ package reaches, if it is installed."""
    try:
        import hqq.core.quantize  # noqa: F401
    except ImportError as error:
        print(f"without the package hqq to compare with: {error}\n")
        return
    print(f"| hqq | {' | '.join(matrices)} |\n|{'---|' * (len(matrices) + 1)}")
    for block_size in (32, 64):
        for whole_zeros, kind in ((False, "its own zero points"), (True, "whole zero points")):
            errors = [f"{hqq_error(weight, block_size, whole_zeros):.4f}" for weight in matrices.values()]
            print(f"| block {block_size}, {kind} | {' | '.join(errors)} |")
    print(flush=True)


def load(source: WeightSource, grid: str, device: torch.device) -> nn.Module:
    """Return the model in fp32 with its linear layers on ``grid``."""
    quantizer = installed_plugins().quantizers.create(Choice.parse(grid))
    model = load_language_model(source, quantizer, device=device, dtype=torch.float32).eval()
    cast(PreTrainedModel, model).set_attn_implementation("sdpa")  # ours needs the rows of a batch laid out
    return model


@torch.no_grad()
def predict(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logarithms of the predicted probabilities, ``[tokens - 1, vocabulary]``."""
    return F.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)


def linear_layers(model: nn.Module) -> list[FrozenLinear]:
    """Return the frozen linear layers in the order of the model."""
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


def measure(source: WeightSource, grid: str, exact: nn.Module, expected: Tensor, ids: Tensor) -> Outcome:
    """Load the model on a grid and compare it with the exact one."""
    started = time.perf_counter()
    model = load(source, grid, ids.device)
    seconds = time.perf_counter() - started
    error = energy = bits = weights = 0.0
    for layer, original in zip(linear_layers(model), linear_layers(exact), strict=True):
        weight = original.dequantize()
        error += float((layer.dequantize() - weight).square().sum())
        energy += float(weight.square().sum())
        bits += layer.bits_per_weight() * weight.numel()
        weights += weight.numel()
    actual = predict(model, ids)
    return Outcome(
        bits=bits / weights,
        weight_error=math.sqrt(error / energy),
        divergence=float((expected.exp() * (expected - actual)).sum(-1).mean()),
        agreement=float((actual.argmax(-1) == expected.argmax(-1)).float().mean()),
        perplexity=perplexity(actual, ids),
        seconds=seconds,
    )


def perplexity(predicted: Tensor, ids: Tensor) -> float:
    """Return the perplexity of the text."""
    return math.exp(float(F.nll_loss(predicted, ids[1:])))


def main() -> None:
    """Measure each grid and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--grid", action="append", help="a quantizer with options; may be repeated")
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    device = pick_device("auto")
    path = locate(arguments.model)
    source, tokenizer = open_source(path), load_tokenizer(path)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: arguments.tokens], device=device)
    exact = load(source, "none", device)
    expected = predict(exact, ids)
    print(
        f"{arguments.model}, {len(ids)} tokens, on {describe(device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; perplexity in fp32 {perplexity(expected, ids):.2f}\n"
    )
    matrices = random_matrices()
    print_hqq(matrices)
    head = ("grid", "bits", *matrices, "weights of the model", "mean KL", "top-1", "perplexity", "loading")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for grid in arguments.grid or GRIDS:
        quantizer = installed_plugins().quantizers.create(Choice.parse(grid))
        errors = [f"{relative_error(quantizer, weight):.4f}" for weight in matrices.values()]
        found = measure(source, grid, exact, expected, ids)
        cells = (
            f"`{grid}`", f"{found.bits:.2f}", *errors, f"{found.weight_error:.4f}", f"{found.divergence:.3f}",
            f"{found.agreement:.1%}", f"{found.perplexity:.1f}", f"{found.seconds:.1f} s",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
