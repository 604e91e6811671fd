"""Exports a run into a new folder; the folder gets its name only when it is complete and passed its check."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from lavintk.errors import RunError

if TYPE_CHECKING:
    from lavintk.registry import Choice
    from lavintk.run import Run


def export_run(run: Run, choice: Choice, out: Path, *, verify: bool = True) -> None:
    """Write ``run`` in the format ``choice`` into ``out``.

    :param verify: compare folders of lavintk's own runtime with the run; others are not compared.
    :raises RunError: ``out`` is in use or cannot be made, or the folder does not behave like the run.
    :raises LavintkError: the run cannot be expressed in the format. Nothing is left behind.
    """
    from lavintk.plugins import installed_plugins

    exporter = installed_plugins().exporters.create(choice)
    _check_free(out)
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise RunError(f"{out} cannot be made: {error}. Choose another --out.") from error
    try:
        exporter.export(run, partial)
        if verify:
            _verify(run, partial, out)
        if out.exists():
            out.rmdir()  # empty, as checked
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the export is in it
                parent.rmdir()


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "exists and is not empty" if out.is_dir() else "is a file"
        raise RunError(f"{out} {found}; choose another --out, or remove it")


def _verify(run: Run, partial: Path, out: Path) -> None:
    from lavintk.runtime import is_export

    if not is_export(partial):
        return
    from lavintk.merge import load_on_cpu
    from lavintk.verify import record, verify

    trained = type(run).open(run.folder)  # anew: the exporter may have changed the model, or holds it on disk only
    load_on_cpu(trained)
    result = verify(trained, partial, records=8)
    record(partial, result, run)
    faults = result.faults()
    if faults:
        rejected = out.with_name(f"{out.name}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        partial.rename(rejected)
        raise RunError(
            f"the exported folder does not behave like {run.folder}:\n"
            + "\n".join(f"  - {fault}" for fault in faults)
            + f"\nIt was kept as {rejected}. Try --quant int8, --set calibrate=64 or --retune 100."
        )
