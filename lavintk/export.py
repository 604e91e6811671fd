"""Exports a run or a model folder into a new folder, which gets its name when it is complete and passed its check."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import click

from lavintk.contracts import SizedExporter
from lavintk.errors import RunError

if TYPE_CHECKING:
    from lavintk.contracts import Exporter
    from lavintk.registry import Choice
    from lavintk.run import Run

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a file system or a user's share of it is full."""
COMPARED_RECORDS = 8


def export(
    source: Path,
    choice: Choice,
    out: Path,
    *,
    peft: Path | None = None,
    verify: bool = True,
    data: Choice | None = None,
) -> None:
    """Write ``source``, a run or a model folder of transformers', in the format ``choice`` into ``out``.

    :param peft: folder of an adapter on a model folder, see :func:`export_model`.
    :param verify: as ``data``, see :func:`export_run`.
    :raises RunError: ``source`` is neither, or an adapter was given for a run.
    :raises LavintkError: as :func:`export_run` and :func:`export_model`.
    """
    from lavintk.importing import MODEL_CONFIG
    from lavintk.run import MANIFEST, RECIPE, Run

    is_run = any((source / name).is_file() for name in (RECIPE, MANIFEST))
    if is_run and peft is not None:
        raise RunError(f"{source} is a run, which has its own adapter; --peft goes with a model folder")
    if is_run:
        export_run(Run.open(source), choice, out, verify=verify, data=data)
    elif (source / MODEL_CONFIG).is_file():
        export_model(source, choice, out, peft=peft, verify=verify, data=data)
    else:
        raise RunError(f"{source} {_about_neither(source)}")


def export_model(
    model: Path, choice: Choice, out: Path, *, peft: Path | None = None, verify: bool = True, data: Choice | None = None
) -> None:
    """Write a language model's folder, with an adapter of another program or without, in the format ``choice``.

    It becomes a run (:func:`lavintk.importing.import_model`) that lasts as long as the export.

    :param data: records to compare on; without, nothing is compared.
    :raises LavintkError: as :func:`lavintk.importing.import_model` and :func:`export_run`.
    """
    from lavintk.importing import import_model
    from lavintk.plugins import installed_plugins

    exporter = installed_plugins().exporters.create(choice)
    check_free(out)
    with folder_beside(out) as folder:
        run = import_model(model, folder / "run", peft=peft, data=data)
        _export(run, exporter, out, verify, None)


def export_run(run: Run, choice: Choice, out: Path, *, verify: bool = True, data: Choice | None = None) -> None:
    """Write ``run`` in the format ``choice`` into ``out``.

    :param verify: compare folders of lavintk's own runtime with the run; others are not compared.
    :param data: records to compare on; by default those of the run's recipe.
    :raises RunError: ``out`` is in use, cannot be made or has too little room, or the folder does not behave like the
        run.
    :raises LavintkError: the run cannot be expressed in the format. Nothing is left behind.
    """
    from lavintk.plugins import installed_plugins

    exporter = installed_plugins().exporters.create(choice)
    check_free(out)
    _export(run, exporter, out, verify, data)


def _export(run: Run, exporter: Exporter, out: Path, verify: bool, data: Choice | None) -> None:
    with folder_beside(out) as partial:
        _check_room(run, exporter, out, partial)
        exporter.export(run, partial)
        _check_or_describe(run, partial, out, verify, data)
        if out.exists():
            out.rmdir()  # empty, as checked
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(out)


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; unless it was renamed, it is gone afterwards, with those made for it.

    :raises RunError: it cannot be made, or the system refused something in between.
    """
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise RunError(f"{out} cannot be made: {error}. Choose another --out.") from error
    try:
        yield partial
    except OSError as error:
        if error.errno in FULL:
            raise RunError(f"{out} cannot be written: {error}. Is the disk full?") from error
        raise RunError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the export is in it
                parent.rmdir()


def check_free(out: Path) -> None:
    """Refuse a folder to be made that is in use.

    :raises RunError: it is a file, or a folder that holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "exists and is not empty" if out.is_dir() else "is a file"
        raise RunError(f"{out} {found}; choose another --out, or remove it")


def _check_room(run: Run, exporter: Exporter, out: Path, partial: Path) -> None:
    """Refuse a file system that cannot take the weights.

    :raises RunError: says how much is needed and how much is free.
    """
    from lavintk.models.build import build_outline
    from lavintk.plugins import installed_plugins

    if not isinstance(exporter, SizedExporter):
        return
    outline, _ = build_outline(run.recipe, installed_plugins())
    needed, free = exporter.bytes_needed(run, outline), shutil.disk_usage(partial).free
    if needed > free:
        raise RunError(
            f"{out} needs {needed / 1e6:,.1f} MB for the weights alone, and its file system has {free / 1e6:,.1f} MB "
            "free. Make room, choose an --out elsewhere, or a grid of fewer bits."
        )


def _about_neither(source: Path) -> str:
    """Say what ``source`` is, if it is neither a run nor a model."""
    known = "so it is neither a run (recipe.yaml, manifest.json) nor a model folder (config.json, *.safetensors)"
    if not source.is_dir():
        return f"{'is a file' if source.exists() else 'does not exist'}, {known}; `lavintk train` makes runs"
    names = sorted(path.name for path in source.iterdir())
    held = f"holds {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else "is empty"
    adapter = any(name.startswith("adapter_") for name in names)
    advice = (
        ". It looks like an adapter: name the folder of its base model, and this one with --peft" if adapter else ""
    )
    return f"{held}, {known}{advice}"


def _check_or_describe(run: Run, partial: Path, out: Path, verify: bool, data: Choice | None) -> None:
    """Compare a folder of lavintk's own runtime with the model; where that cannot be, write its page without figures.

    :raises RunError: it does not behave like the model; the folder is kept beside ``out``.
    """
    from lavintk.runtime import is_export

    if not is_export(partial):
        return
    records = run.recipe.data
    nothing = data is None and records.test is None and records.validation is None and records.train is None
    if verify and nothing:
        click.echo("not compared with the model: a model folder names no records; give some with --data FORMAT:PATH")
    if verify and not nothing:
        _verify(run, partial, out, data)
    else:
        _describe(run, partial)


def _describe(run: Run, folder: Path) -> None:
    """Write the page of a folder that was not compared."""
    from lavintk.model_card import card, with_provenance
    from lavintk.runtime import DESCRIPTION

    path = folder / DESCRIPTION
    content = with_provenance(json.loads(path.read_text(encoding="utf-8")), run)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(content), encoding="utf-8")


def _verify(run: Run, partial: Path, out: Path, data: Choice | None) -> None:
    from lavintk.merge import load_on_cpu
    from lavintk.model_card import origin
    from lavintk.verify import record, verify

    trained = type(run).open(run.folder)  # anew: the exporter may have changed the model, or holds it on disk only
    load_on_cpu(trained)
    result = verify(trained, partial, records=COMPARED_RECORDS, data=data)
    record(partial, result, run)
    faults = result.faults()
    if faults:
        rejected = out.with_name(f"{out.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        partial.rename(rejected)
        raise RunError(
            f"the exported folder does not behave like {origin(run)}:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + f"\nIt was kept as {rejected}. Try --quant int8, --set calibrate=64 or --retune 100."
        )
