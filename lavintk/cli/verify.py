"""``lavintk verify``: compare an exported folder with the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--records", type=click.IntRange(min=1), default=32, show_default=True, help="Records to compare on.")
@click.option("--data", help="Records, FORMAT:PATH.  [default: the recipe's test, validation or training data]")
@click.option("--split", help="Split of the data.  [default: the recipe's]")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest greedy answer to compare."
)
@click.option(
    "--accuracy",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Questions that both answer in the recipe's evaluation.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of DIR.  [default: the physical cores]")
@click.option(
    "--record/--no-record",
    "keep",
    default=True,
    show_default=True,
    help="Write the figures into lavintk_export.json and README.md of DIR.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    run: Path,
    folder: Path,
    records: int,
    data: str | None,
    split: str | None,
    tokens: int,
    accuracy: int,
    threads: int | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Compare the exported folder DIR with the trained model of RUN; out of bounds is an error."""
    from rich.console import Console

    from lavintk.errors import ModelError, RunError
    from lavintk.importing import MODEL_CONFIG
    from lavintk.run import MANIFEST, RECIPE, Run
    from lavintk.runtime.manifest import Manifest
    from lavintk.verify import record
    from lavintk.verify import verify as compare

    Manifest.read(folder)  # a wrong path shows before the model is loaded
    if (run / MODEL_CONFIG).is_file() and not any((run / name).is_file() for name in (RECIPE, MANIFEST)):
        raise RunError(
            f"{run} is a model folder, and an exported folder is compared with a run. Export the model with records, "
            f"and what is written is compared: lavintk export {run} --data FORMAT:PATH. A lasting run of it, which "
            "this command takes, is made by lavintk.importing.import_model in Python."
        )
    with Console(stderr=True).status(f"loading {run} as it was trained") as status:
        opened = Run.open(run).load("cpu")
        found = compare(
            opened, folder, records=records, data=data, split=split, tokens=tokens, accuracy=accuracy, threads=threads,
            say=lambda words: status.update(f"comparing: {words}"),
        )  # fmt: skip
    faults = found.faults()
    if keep:
        record(folder, found, opened)
    if as_json:
        click.echo(json.dumps({**found.as_json(), "faults": faults}))
    else:
        found.table(Console(highlight=False))
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ModelError(f"{folder} is not what was trained:\n{listed}")
