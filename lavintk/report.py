"""What the terminal shows while a model loads, trains and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from lavintk.contracts import StepInfo

LINE_SECONDS = 10.0
"""Without a terminal that can redraw, a line is printed at most this often."""
SMALL_LOSS = 0.01
"""A loss below has no three digits behind the point that say anything: it is shown with an exponent."""


class TrainingDisplay:
    """A progress bar with the figures of the last step; plain lines where the output is no terminal."""

    def __init__(self, console: Console, total: int, start: int = 0, measure: str = "loss") -> None:
        self.console, self.total, self.measure = console, total, measure
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("train", total=total, completed=start, figures="")

    def __enter__(self) -> TrainingDisplay:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, info: StepInfo) -> None:
        """Show a finished step."""
        figures = step_figures(info, self.measure)
        if self.console.is_terminal:
            self._progress.update(self._task, completed=info.step, figures=figures)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or info.step == self.total:
            self._last_line = time.monotonic()
            self.console.print(f"step {info.step}/{self.total}  {figures}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text)


def step_figures(info: StepInfo, measure: str = "loss") -> str:
    """Return the figures of a step in one line.

    :param measure: what the loss is called.
    """
    loss = f"{info.loss:.3f}" if not 0 < info.loss < SMALL_LOSS else f"{info.loss:.1e}"
    return (
        f"{measure} {loss}  lr {info.learning_rate:.1e}  {info.tokens_per_second:,.0f} tok/s  "
        f"{info.samples_per_second:,.1f} samples/s  {info.memory_bytes / 2**30:.2f} GiB  "
        f"{duration(info.seconds_left)} left"
    )


@contextmanager
def loading_bar(console: Console, text: str) -> Iterator[object]:
    """Yield a function ``(done, total)`` in bytes that drives a bar."""
    columns = (TextColumn(text), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


@contextmanager
def counting_bar(console: Console, text: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function that moves a bar of ``total`` things on by one."""
    columns = (TextColumn(text), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)


def scores_table(before: Mapping[str, float] | None, after: Mapping[str, float] | None, title: str) -> Table:
    """Return accuracy before and after training beside what always giving the commonest answer reaches."""
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    table.add_column("accuracy", justify="right")
    shown = after or before or {}
    if "majority_accuracy" in shown:
        table.add_row("most frequent answer", f"{shown['majority_accuracy']:.1%}")
    for name, scores in (("before training", before), ("after training", after)):
        if scores and "accuracy" in scores:
            table.add_row(name, f"{scores['accuracy']:.1%}")
    return table


def duration(seconds: float) -> str:
    """Return ``45 s``, ``3:05 min`` or ``2:07 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
