"""The conformance kit: what plugin authors test their plugins with.

pytest finds the fixtures by itself where lavintk is installed (:mod:`lavintk.testing.fixtures`): ``tiny_llm``,
``tiny_vlm``, ``tiny_run``, ``run_cli`` and ``plugin_manager``. The functions here ask a plugin for what
:mod:`lavintk.contracts` promises; lavintk's own plugins pass through them too. A broken promise is an
:class:`AssertionError` that says which one and with what figures; what cannot be asked on this machine is returned with
its reason, and pytest lists it at the end.

Nothing here imports torch before a check runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.testing.outcome import Outcome, Report, TinyModel

if TYPE_CHECKING:
    from torch import Tensor

    from lavintk.contracts import Adapter, DatasetFormat, Exporter, Optimizer, Quantizer
    from lavintk.layers import PackedWeight
    from lavintk.run import Run

__all__ = [
    "Outcome",
    "Report",
    "TinyModel",
    "check_adapter",
    "check_dataset",
    "check_exporter",
    "check_optimizer",
    "check_quantizer",
]


def check_quantizer(
    make: Callable[[], Quantizer],
    *,
    max_error: float = 0.2,
    unpack: Callable[[PackedWeight], Tensor] | None = None,
) -> Report:
    """Check that a quantizer keeps what :class:`lavintk.contracts.Quantizer` and its layers promise.

    Asked on a CPU, unless ``requires_cuda``, and on CUDA where there is a device: error of the round trip, product and
    gradient to the input against a dense reference, no gradient to the base, compute types and moves, bits of the
    ``state_dict`` through :meth:`~lavintk.contracts.Quantizer.empty`, deep copies, what ``packed()`` says of the
    storage, odd shapes right or refused, and on CUDA that ``graph_safe`` is honest.

    :param make: returns a new quantizer.
    :param max_error: largest root mean square error of the weights, relative to that of the weights themselves, for
        normally distributed ones. NF4 has about 0.09, a good 3-bit grid 0.2, 2 bits 0.4.
    :param unpack: for a scheme of the plugin's own that codes, codebook, zero points and scales do not express: returns
        the weight ``[out, in]`` as an exporter would compute it from ``packed()`` alone.
    :raises AssertionError: a promise is broken.
    """
    from lavintk.testing import quantizers

    return quantizers.check(make, max_error, unpack)


def check_optimizer(make: Callable[[], Optimizer], *, lr: float = 0.05, language_lr: float | None = None) -> Report:
    """Check that an optimizer keeps what :class:`lavintk.contracts.Optimizer` promises.

    Asked on a CPU, and on CUDA where there is a device: it converges on a quadratic and on a tiny language model, goes
    on identically from a saved state, keeps to its parameter groups and to the learning rate that the schedule sets,
    needs no more memory than ``state_bits`` says, does without CUDA what ``without_cuda`` declares, and takes the same
    steps on flat parameters if it is ``elementwise``.

    :param make: returns a new optimizer.
    :param lr: peak learning rate for the quadratic, of which values of size 1 are to be found in 200 steps.
    :param language_lr: that for the language model, by default a fifth of it; plain gradient descent wants much more.
    :raises AssertionError: a promise is broken.
    """
    from lavintk.testing import optimizers

    return optimizers.check(make, lr, lr / 5 if language_lr is None else language_lr)


def check_adapter(make: Callable[[], Adapter], *, vision: bool = True) -> Report:
    """Check that an adapter keeps what :class:`lavintk.contracts.Adapter` promises.

    Asked on a tiny model in fp32 on a CPU: it changes no output at the start, only its parameters train and each of
    them does, saving and loading (and what a damaged file does), side tokens, the update of each linear layer under
    each condition against the difference that the adapter makes there, and the model with all updates folded in
    against the adapted one. An adapter without an affine form may say so (:class:`~lavintk.errors.NotAffineError`).

    :param make: returns a new adapter that is not attached.
    :param vision: give the model a vision tower; False for adapters that only fit text models.
    :raises AssertionError: a promise is broken.
    """
    from lavintk.testing import adapters

    return adapters.check(make, vision)


def check_exporter(
    make: Callable[[], Exporter],
    run: Run | None = None,
    *,
    vision: bool = False,
    logits: Callable[[Path, Sequence[int]], Any] | None = None,
    tolerance: float = 1e-3,
) -> Report:
    """Check that an exporter keeps what :class:`lavintk.contracts.Exporter` promises.

    Asked: the folder is written, nothing outside of it, and the run is left as it was; the folder can be moved, as it
    is when it takes its final name; ``bytes_needed``, where it is offered, is not more than what was written; a run
    that cannot be exported gives a :class:`~lavintk.errors.LavintkError`; and the folder loads and computes what the
    run computes. The last is asked through ``logits``, or by itself for folders of lavintk's own runtime and for model
    folders that transformers loads.

    :param make: returns a new exporter.
    :param run: a finished run; by default a tiny one is trained for it, which takes a few seconds.
    :param vision: whether that run has a vision tower.
    :param logits: loads a folder and returns the logits ``[T, vocabulary]`` of one row of T tokens, text only, as
        anything that numpy takes.
    :param tolerance: largest error of the logits, relative to their size (both as norms).
    :raises AssertionError: a promise is broken.
    """
    from lavintk.testing import exporters

    return exporters.check(make, run, vision, logits, tolerance)


def check_dataset(
    make: Callable[[Path], DatasetFormat],
    path: Path | None,
    *,
    split: str = "train",
    bad: Path | None = None,
    faults: Sequence[str] = (),
) -> Report:
    """Check that a format keeps what :class:`lavintk.contracts.DatasetFormat` promises.

    Asked: records of the declared form with unique ids, the same each time; images that can be read, and markers that
    fit them; that training sees the answers and nothing else, token for token; that a missing file is a
    :class:`~lavintk.errors.DataError`; and that all bad rows are found, each with its line or record.

    :param make: returns a format that reads the file (or folder) it is given.
    :param path: good data with answers; at least three records, of JSON lines or a JSON list if ``bad`` is not given.
        It is not changed: bad rows are put into a copy. None for a format that reads no file.
    :param split: the split to read.
    :param bad: data with faults, for other kinds of files.
    :param faults: what the error on ``bad`` must say, one text for each fault.
    :raises AssertionError: a promise is broken.
    """
    from lavintk.testing import datasets

    return datasets.check(make, path, split, bad, faults)
