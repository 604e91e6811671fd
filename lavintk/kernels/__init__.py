"""Fused kernels for training a model whose norm weights are frozen, and torch's own operations in their place.

On a CUDA device where Triton runs, :func:`rms_norm`, :func:`swiglu` and :func:`rope` are one kernel forward and one
backward, and keep their inputs only; elsewhere they are written out in torch (:mod:`lavintk.kernels.plain`). Both
round where transformers' modules round; but where :func:`rms_norm_and_pass` adds gradients up, its kernel rounds once
and torch each time, and :func:`add_low_rank` and :func:`swiglu_low_rank` round nothing but their results. The kernels
can be recorded in a CUDA graph once they have run a time outside of it, which compiles them: they never wait for the
device, and their grids follow from shapes alone.
``LAVINTK_KERNELS`` switches them (:mod:`lavintk.kernels.choice`).
"""

from lavintk.kernels.choice import NAMES, VARIABLE, fused, problem, using
from lavintk.kernels.functions import (
    add_low_rank,
    rms_norm,
    rms_norm_and_pass,
    rope,
    swiglu,
    swiglu_low_rank,
)
from lavintk.kernels.plain import LowRank

__all__ = [
    "NAMES", "VARIABLE", "LowRank", "add_low_rank", "fused", "problem", "rms_norm", "rms_norm_and_pass", "rope",
    "swiglu", "swiglu_low_rank", "using",
]  # fmt: skip
