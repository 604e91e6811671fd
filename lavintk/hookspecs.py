"""The hooks a plugin may implement: what lavintk asks of plugins, and when.

A plugin is a module (or object) found by an entry point of the group ``lavintk``. It implements any of these with
``@lavintk.hookimpl``. Hooks that register hand over *factories*, so listing what exists costs nothing; the
packages a factory needs are imported inside it. Hooks of a run let a logger follow training.

Arguments are matched by name and an implementation may leave out those it does not need. Arguments may be added in
later versions, they are never renamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from lavintk.contracts import (
        Adapter,
        DatasetFormat,
        Evaluation,
        Exporter,
        Optimizer,
        Quantizer,
        RunInfo,
        StepInfo,
    )
    from lavintk.registry import Registry

hookspec = pluggy.HookspecMarker("lavintk")
hookimpl = pluggy.HookimplMarker("lavintk")


@hookspec
def lavintk_register_quantizers(registry: Registry[Quantizer]) -> None:
    """Offer quantizers under the names that ``lavintk train --quant`` accepts.

    Called once, before a recipe is checked; no model is loaded yet. Example: ``plugins/lavintk_bnb``.

    :param registry: call ``registry.add("nf4", make_nf4, options=NF4Options, summary="...")`` for each.
    """


@hookspec
def lavintk_register_optimizers(registry: Registry[Optimizer]) -> None:
    """Offer optimizers under the names that ``lavintk train --optim`` accepts.

    Called once, before a recipe is checked. Example: ``plugins/lavintk_bnb``.

    :param registry: call ``registry.add("paged", make_paged_adamw, summary="...")`` for each.
    """


@hookspec
def lavintk_register_adapters(registry: Registry[Adapter]) -> None:
    """Offer adapters under the names that ``lavintk train --adapter`` accepts.

    Called once, before a recipe is checked. Example: ``plugins/lavintk_lora``.

    :param registry: call ``registry.add("lora", make_lora, options=LoraOptions, summary="...")`` for each.
    """


@hookspec
def lavintk_register_exporters(registry: Registry[Exporter]) -> None:
    """Offer exporters by name.

    Called once, before a command runs. Example: ``exporters/lavintk_onnx``.

    :param registry: call ``registry.add("onnx", make_exporter, options=OnnxOptions, summary="...")`` for each.
    """


@hookspec
def lavintk_register_datasets(registry: Registry[DatasetFormat]) -> None:
    """Offer record formats under the names that ``--data NAME:PATH`` accepts.

    Called once, before a recipe is checked; no file is opened yet. Example: ``plugins/lavintk_formats``.

    :param registry: call ``registry.add("alpaca", AlpacaFormat, options=AlpacaOptions, summary="...")`` for each.
    """


@hookspec
def lavintk_register_evaluations(registry: Registry[Evaluation]) -> None:
    """Offer evaluations under the names that ``lavintk eval --evaluation`` accepts.

    Called once, before a recipe is checked. Example: ``lavintk/builtin.py``.

    :param registry: call ``registry.add("exact-match", make_exact_match, summary="...")`` for each.
    """


@hookspec
def lavintk_register_commands(group: click.Group) -> None:
    """Add commands to the command line.

    Called at every start of ``lavintk``, so import only what is needed to declare the options.

    :param group: call ``group.add_command(command)``; a name that lavintk or another plugin uses is an error. What
        makes a run of a checkpoint from elsewhere goes into ``group.commands["import"]``: ``plugins/lavintk_mma``.
    """


@hookspec
def lavintk_run_started(run: RunInfo) -> None:
    """A run is about to take its first step: model and data are loaded, the run folder exists.

    Example: ``plugins/lavintk_tensorboard`` opens its event file here.

    :param run: folder, resolved recipe and counts of the run.
    """


@hookspec
def lavintk_step_finished(run: RunInfo, step: StepInfo) -> None:
    """An optimizer step is done. Called after every ``train.log_every``-th step and the last one, so be quick.

    :param run: the run.
    :param step: loss, learning rate, speed and memory of the step.
    """


@hookspec
def lavintk_evaluation_finished(run: RunInfo, step: int, name: str, scores: dict[str, float]) -> None:
    """An evaluation during or after training is done.

    :param run: the run.
    :param step: optimizer steps taken so far; 0 is before training.
    :param name: name of the evaluation, for example ``"exact-match"`` or ``"loss"``.
    :param scores: figures by name.
    """


@hookspec
def lavintk_checkpoint_saved(run: RunInfo, step: int, folder: str) -> None:
    """A checkpoint is completely on disk.

    :param run: the run.
    :param step: optimizer steps taken so far.
    :param folder: where it lies.
    """


@hookspec
def lavintk_run_finished(run: RunInfo, status: str) -> None:
    """A run ended; called also after an interruption or a fault, once everything is saved.

    :param run: the run.
    :param status: ``"finished"``, ``"interrupted"``, ``"stopped early"`` or ``"failed"``.
    """
