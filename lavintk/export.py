"""Exports a run or a model folder into a new folder, which gets its name when it is complete and passed its check."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import click

from lavintk.contracts import ComparedExporter, SizedExporter
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

    check_free(out)
    click.echo(f"loading the model folder {model} to export it as {choice.name}")
    exporter = installed_plugins().exporters.create(choice)
    with folder_beside(out) as folder:
        run = import_model(model, folder / "run", peft=peft, data=data)
        _Export(run, exporter, choice.name, out, verify, None).write()


def export_run(run: Run, choice: Choice, out: Path, *, verify: bool = True, data: Choice | None = None) -> None:
    """Write ``run`` in the format ``choice`` into ``out``.

    :param verify: compare folders of lavintk's own runtime with the run; others are not compared.
    :param data: records to compare on; by default those of the run's recipe.
    :raises RunError: ``out`` is in use, cannot be made or has too little room, onnxruntime or the records to compare
        on are missing, or the folder does not behave like the run.
    :raises LavintkError: the run cannot be expressed in the format. Nothing is left behind.
    """
    from lavintk.plugins import installed_plugins

    check_free(out)
    click.echo(f"loading the run {run.folder} to export it as {choice.name}")
    exporter = installed_plugins().exporters.create(choice)
    _Export(run, exporter, choice.name, out, verify, data).write()


class _Export:
    """One export: the folder is written, compared or described, and gets its name.

    :param kind: name of the format.
    """

    def __init__(self, run: Run, exporter: Exporter, kind: str, out: Path, verify: bool, data: Choice | None) -> None:
        self.run, self.exporter, self.kind, self.out, self.verify, self.data = run, exporter, kind, out, verify, data

    def write(self) -> None:
        """Do all of it."""
        self.check_comparison()
        with folder_beside(self.out) as partial:
            _check_room(self.run, self.exporter, self.out, partial)
            self.exporter.export(self.run, partial)
            self.compare_or_describe(partial)
            if self.out.exists():
                self.out.rmdir()  # empty, as checked
            partial.chmod(0o755)  # mkdtemp's folders are private
            partial.rename(self.out)

    @property
    def has_records(self) -> bool:
        """Whether there is anything to compare on."""
        records = self.run.recipe.data
        return any(choice is not None for choice in (self.data, records.test, records.validation, records.train))

    def check_comparison(self) -> None:
        """Refuse a comparison that would fail behind the work, which may take an hour.

        :raises RunError: onnxruntime is missing, or the data has no records.
        :raises DataError: the records cannot be read.
        """
        if not (self.verify and self.has_records and isinstance(self.exporter, ComparedExporter)):
            return
        from lavintk.errors import ModelError
        from lavintk.runtime.sessions import import_onnxruntime

        try:
            import_onnxruntime()
        except ModelError as error:
            raise RunError(f"{error}\nOr leave the comparison with the model out: --no-verify.") from error
        from lavintk.verify.held_out import HeldOut

        HeldOut.of(self.run, self.data, None)

    def compare_or_describe(self, partial: Path) -> None:
        """Compare a folder of lavintk's own runtime with the model; where that cannot be, write its page only.

        :raises RunError: it does not behave like the model; the folder is kept beside ``out``.
        """
        from lavintk.runtime import is_export

        if not is_export(partial):
            if self.verify:
                click.echo(f"not compared with the model: lavintk runs onnx folders only, and this is {self.kind}")
            return
        if self.verify and not self.has_records:
            click.echo(
                "not compared with the model: a model folder names no records; give some with --data FORMAT:PATH"
            )
        if self.verify and self.has_records:
            self.compare(partial)
        else:
            _describe(self.run, partial)

    def compare(self, partial: Path) -> None:
        """Compare the folder with the model, say what was found and write it down.

        :raises RunError: see :meth:`compare_or_describe`.
        """
        from rich.console import Console

        from lavintk.merge import load_on_cpu
        from lavintk.report import duration
        from lavintk.verify import record, verify

        click.echo(f"comparing it with the model in torch on {COMPARED_RECORDS} records (--no-verify leaves this out)")
        started = time.monotonic()
        with Console().status("loading the model as it was trained") as status:
            # anew: the exporter may have changed the model, or holds it on disk only
            trained = type(self.run).open(self.run.folder)
            load_on_cpu(trained)
            result = verify(
                trained, partial, records=COMPARED_RECORDS, data=self.data,
                say=lambda words: status.update(f"comparing: {words}"),
            )  # fmt: skip
        record(partial, result, self.run)
        for line in result.verdict():
            click.echo(f"  {line}")
        click.echo(f"  took {duration(time.monotonic() - started)}")
        if faults := result.faults():
            self.reject(partial, faults)

    def reject(self, partial: Path, faults: list[str]) -> None:
        """Keep the folder under another name.

        :raises RunError: always; with ``faults``.
        """
        from lavintk.model_card import origin

        rejected = self.out.with_name(f"{self.out.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        partial.rename(rejected)
        raise RunError(
            f"the exported folder does not behave like {origin(self.run)}:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + f"\nIt was kept as {rejected}. Try --quant int8, --set calibrate=64 or --retune 100."
        )


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


def _describe(run: Run, folder: Path) -> None:
    """Write the page of a folder that was not compared."""
    from lavintk.model_card import card, with_provenance
    from lavintk.runtime import DESCRIPTION

    path = folder / DESCRIPTION
    content = with_provenance(json.loads(path.read_text(encoding="utf-8")), run)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(content), encoding="utf-8")
