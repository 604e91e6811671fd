"""``lavintk eval``: score a trained run, an exported folder, or answers that exist already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lavintk.contracts import EvaluationResult
    from lavintk.run import Run
    from lavintk.runtime import ExportedModel

COUNTS = ("questions", "unanswered", "unknown_answers", "missing_questions")
"""Scores that are numbers of questions; any other is a share."""


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--data", help="Records to answer, FORMAT:PATH.  [default: the recipe's test data]")
@click.option("--split", help="Split of the data.  [default: the recipe's; test without RUN]")
@click.option("--evaluation", help="How to score.  [default: the one called like --data's format, else the recipe's]")
@click.option(
    "--scoring",
    type=click.Choice(["generate", "likelihood"]),
    help="Read the written answer, or take the most likely choice; for evaluations that offer both.",
)
@click.option("--predictions", type=click.Path(path_type=Path), help="Score these answers, without RUN and model.")
@click.option("--max-new-tokens", type=int, help="Longest answer.  [default: the recipe's]")
@click.option(
    "--batch-size", type=int, help="Rows answered at a time.  [default: the recipe's; 8 for an exported folder]"
)
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an exported folder.")
@click.option("--save-predictions", type=click.Path(path_type=Path), help="Write each answer to this JSONL file.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    run: Path | None,
    data: str | None,
    split: str | None,
    evaluation: str | None,
    scoring: str | None,
    predictions: Path | None,
    max_new_tokens: int | None,
    batch_size: int | None,
    device: str | None,
    threads: int | None,
    save_predictions: Path | None,
    as_json: bool,
) -> None:
    """Score the trained model of RUN, or with --predictions a file of answers. RUN may be an exported folder.

    --predictions takes {"outputs": {id: text}} or {"results": {id: index}} as LLaVA publishes, LaVIN's preds.json, what
    --save-predictions wrote, or (with --evaluation mme) a folder of MME's answer files.
    """
    from lavintk.errors import RunError

    about_a_model = {
        "--scoring": scoring,
        "--max-new-tokens": max_new_tokens,
        "--batch-size": batch_size,
        "--device": device,
        "--threads": threads,
        "--save-predictions": save_predictions,
    }
    if predictions is not None:
        _check_without_model(run, [flag for flag, value in about_a_model.items() if value is not None])
        _show(_score_file(predictions, data, split, evaluation), as_json)
        return
    if run is None:
        raise RunError("name the RUN whose model answers, or a file of answers with --predictions")
    if save_predictions is not None and not save_predictions.absolute().parent.is_dir():
        folder = save_predictions.absolute().parent
        raise RunError(f"--save-predictions {save_predictions}: the folder {folder} does not exist")
    result = _scored(run, device, threads).evaluate(
        data,
        split=split,
        evaluation=evaluation,
        scoring=scoring,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if save_predictions is not None:
        lines = (json.dumps(vars(p), ensure_ascii=False) for p in result.predictions)
        save_predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _show(result, as_json)


def _scored(folder: Path, device: str | None, threads: int | None) -> Run | ExportedModel:
    """Load a run by torch, an exported folder by onnxruntime."""
    from lavintk.errors import RunError
    from lavintk.runtime.manifest import is_export

    if is_export(folder):
        from lavintk.runtime import load as load_export
        from lavintk.runtime.sessions import providers_for

        return load_export(folder, providers=providers_for(device), threads=threads)
    if threads is not None:
        raise RunError(f"--threads is for exported folders, which {folder} is none of")
    from lavintk.run import load

    return load(folder, device=device)


def _check_without_model(run: Path | None, given: list[str]) -> None:
    from lavintk.errors import RunError

    if run is not None:
        raise RunError(
            f"--predictions scores answers that exist already, without a model: leave {run} out. "
            "To write the answers of a run, use --save-predictions."
        )
    if given:
        raise RunError(
            f"--predictions scores answers that exist already: {', '.join(given)} would change nothing, leave it out"
        )


def _score_file(path: Path, data: str | None, split: str | None, evaluation: str | None) -> EvaluationResult:
    from lavintk.registry import Choice
    from lavintk.scoring import score_predictions

    records, scorer = (None if text is None else Choice.parse(text) for text in (data, evaluation))
    return score_predictions(path, data=records, split=split or "test", evaluation=scorer)


def _show(result: EvaluationResult, as_json: bool) -> None:
    from lavintk.scoring import result_as_json, result_table

    if as_json:
        click.echo(json.dumps(result_as_json(result)))
        return
    if result.table:
        from rich.console import Console

        Console(highlight=False).print(result_table(result.table))
    else:
        for name, score in result.scores.items():
            click.echo(f"{name}: {score:,.0f}" if name in COUNTS else f"{name}: {score:.1%}")
    for note in result.notes:
        click.echo(note)
