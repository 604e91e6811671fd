"""``lavintk import lavin``: make a run of an adapter that LaVIN's own code trained."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("lavin")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--llm", required=True, help="LLaMA it was trained on: Meta's folder, a Hugging Face folder or a hub id.")
@click.option("--vision", required=True, help="CLIP ViT-L/14: OpenAI's file, a Hugging Face folder or a hub id.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--temperature", type=float, help="Of the routers: 10 (7B) or 5 (13B).  [default: the checkpoint's]")
@click.option("--scale", type=float, help="Of the adapters.  [default: the checkpoint's, else 1]")
@click.option("--quant", default="none", show_default=True, help="How the frozen base is stored, for example nf4.")
@click.option("--delta", help="Vicuna's delta, for adapters trained on it; added as LaVIN adds it.")
def import_lavin(
    checkpoint: Path,
    llm: str,
    vision: str,
    out: Path,
    temperature: float | None,
    scale: float | None,
    quant: str,
    delta: str | None,
) -> None:
    """Make a run of CHECKPOINT, an adapter file (checkpoint-19.pth) of LaVIN.

    The run computes as LaVIN's code does, its mistakes included, for the adapter was trained on them. The file is
    read without running code that it may hold.
    """
    from lavintk_mma.importing import import_checkpoint

    run = import_checkpoint(
        checkpoint, llm, vision, out, temperature=temperature, scale=scale, quant=quant, delta=delta
    )
    imported = run.manifest["imported"]
    adapter = run.manifest["recipe"]["adapter"]
    described = ", ".join(f"{key} {value}" for key, value in adapter.items() if key != "name")
    click.echo(f"{imported['tensors']} tensors, {run.manifest['trainable_parameters']:,} values: {described}")
    for note in imported["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"run: {out} (imported)\n  lavintk eval {out} --data scienceqa:DIR --split test")
