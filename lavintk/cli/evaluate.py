"""``lavintk eval``: score a trained run."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Records to answer, FORMAT:PATH.  [default: the recipe's test data]")
@click.option("--split", help="Split of the data.  [default: the recipe's]")
@click.option("--evaluation", help="How to score.  [default: the recipe's]")
@click.option("--max-new-tokens", type=int, help="Longest answer.  [default: the recipe's]")
@click.option("--batch-size", type=int, help="Rows answered at a time.  [default: the recipe's]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--predictions", type=click.Path(path_type=Path), help="Write each answer to this JSONL file.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    run: Path,
    data: str | None,
    split: str | None,
    evaluation: str | None,
    max_new_tokens: int | None,
    batch_size: int | None,
    device: str | None,
    predictions: Path | None,
    as_json: bool,
) -> None:
    """Score the trained model of RUN."""
    from lavintk.errors import RunError
    from lavintk.run import load

    if predictions is not None and not predictions.absolute().parent.is_dir():
        raise RunError(f"--predictions {predictions}: the folder {predictions.absolute().parent} does not exist")
    result = load(run, device=device).evaluate(
        data, split=split, evaluation=evaluation, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    if predictions is not None:
        lines = (json.dumps(vars(p), ensure_ascii=False) for p in result.predictions)
        predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(result.scores))
        return
    for name, score in result.scores.items():
        click.echo(f"{name}: {score:,.0f}" if name == "questions" else f"{name}: {score:.1%}")
