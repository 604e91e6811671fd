"""Charts of benchmarks, as PNG files; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "lavintk:graph": "#0b6e99", "lavintk:eager": "#5aa9c9", "hf": "#8a8f98", "hf:autocast": "#b0b4ba",
    "unsloth": "#d98032",
}  # fmt: skip
"""Of contenders; ours are blue."""
OTHERS = ("#0b6e99", "#d98032", "#4c9f70", "#a05195", "#8a8f98", "#c44e52", "#5aa9c9", "#7f6b3f")
SMALL = 12
"""GiB up to which cases stand in the first panel of a chart of memory."""
CONTEXT_PART = "context and what is held beyond"
PARTS = {
    "linear layers": "#0b6e99", "embedding, head, norms": "#5aa9c9", "vision tower": "#4c9f70",
    "adapter, gradients, optimizer": "#d98032", "layer inputs": "#a05195", "at work": "#c44e52",
    CONTEXT_PART: "#d5d8dd",
}  # fmt: skip
"""What the items of a plan are drawn as, in the order of a bar."""
INK, PALE = "#20242a", "#6b7280"
BAR = 0.74
"""Height of a bar; 1 is the distance between two."""


def can_draw() -> bool:
    """Whether matplotlib is installed; says so if it is not."""
    there = importlib.util.find_spec("matplotlib") is not None
    if not there:
        print("no chart: matplotlib is not installed; --json keeps what is needed to draw it later with --from")
    return there


def step_bars(results: Sequence[Mapping[str, Any]], title: str, footer: Sequence[str], path: Path) -> None:
    """Draw the step time of each contender, a panel per shape, with the peak of allocated memory in the bar.

    :param results: as ``step.py`` writes them; those with an ``error`` get its first words in place of a bar.
    :param footer: small lines at the bottom: device and versions.
    """
    shapes = list(dict.fromkeys(result["shape"] for result in results))
    groups = [[result for result in results if result["shape"] == shape] for shape in shapes]
    longest = max((result["step_ms"] for result in results if "step_ms" in result), default=1.0)
    figure, panels = _panels([len(group) for group in groups], len(footer))
    for axes, shape, group in zip(panels, shapes, groups):
        rows, _, length = shape.partition("x")
        heading = f"{rows} x {length} tokens" if rows != "1" else f"{length} tokens"
        axes.set_title(heading, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_xlim(0, 1.3 * longest)  # room for what is written behind the longest bar
        axes.set_yticks(range(len(group)), [result["contender"] for result in group])
        axes.set_ylim(len(group) - 0.5, -0.5)
        for place, result in enumerate(group):
            _bar(axes, place, result)
    panels[-1].set_xlabel("step time (ms): forward, backward and optimizer; in the bars peak memory allocated (GiB)")
    _finish(figure, title, footer, path)


def _bar(axes: Axes, place: int, result: Mapping[str, Any]) -> None:
    """Draw one bar: memory in it if it is long enough, else behind the time."""
    if "error" in result:
        text = str(result["error"])
        shown = text if len(text) < 60 else f"{text[:57]}..."
        axes.annotate(shown, (0, place), (4, 0), textcoords="offset points", va="center", color=PALE, style="italic")
        return
    milliseconds, memory = float(result["step_ms"]), f"{result['allocated_gib']:.2f} GiB"
    axes.barh(place, milliseconds, BAR, color=COLOURS.get(result["contender"], OTHERS[4]))
    start, end = axes.transData.transform([(0, place), (milliseconds, place)])[:, 0]
    points = (end - start) * 72 / axes.figure.dpi
    fits = points > 6.5 * len(memory)  # a letter of 9 points is about 6 wide
    if fits:
        axes.annotate(memory, (0, place), (6, 0), textcoords="offset points", va="center", color="white")
    time = f"{milliseconds:,.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
    behind = time if fits else f"{time}, {memory}"
    axes.annotate(behind, (milliseconds, place), (5, 0), textcoords="offset points", va="center", color=INK)


def sweep_lines(results: Sequence[Mapping[str, Any]], title: str, footer: Sequence[str], path: Path) -> None:
    """Draw tokens per second and peak memory over the length of rows, a line for each number of rows."""
    measured = [result for result in results if "step_ms" in result]
    figure = _figure(9.6, 4.6)
    left, right = figure.subplots(1, 2)
    lengths = sorted({int(result["shape"].partition("x")[2]) for result in measured})
    for index, rows in enumerate(dict.fromkeys(result["shape"].partition("x")[0] for result in measured)):
        line = [result for result in measured if result["shape"].startswith(f"{rows}x")]
        x = [int(result["shape"].partition("x")[2]) for result in line]
        how = {"marker": "o", "color": OTHERS[index % len(OTHERS)], "label": f"{rows} row{'s' * (rows != '1')}"}
        left.plot(x, [result["tokens_s"] for result in line], **how)
        right.plot(x, [result["allocated_gib"] for result in line], **how)
    for axes, label in ((left, "tokens per second"), (right, "peak memory allocated (GiB)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens per row")
        axes.set_ylabel(label)
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
    left.legend(frameon=False)
    contender = results[0]["contender"] if results else ""
    _finish(figure, f"{contender}: {title}", footer, path)


def memory_bars(results: Sequence[Mapping[str, Any]], title: str, footer: Sequence[str], path: Path) -> None:
    """Draw what is foretold of each case, item by item, as a stacked bar with the measured peaks as marks.

    Small and large cases get a panel each, so that both can be read.

    :param results: as ``memory.py`` writes them; those without a plan are left out.
    """
    shown = [result for result in results if "items" in result]
    small = [result for result in shown if result["predicted_device_gib"] <= SMALL]
    groups = [group for group in (small, [result for result in shown if result not in small]) if group]
    footer = [*footer, "", "", ""]  # room for the legend
    figure, panels = _panels([len(group) for group in groups], len(footer), same_scale=False)
    for axes, group in zip(panels, groups):
        _stack(axes, group)
    panels[-1].set_xlabel("GiB of device memory, foretold; measured: peak allocated (line), in use in all (ring)")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", frameon=False, fontsize=7.5, ncols=4)
    _finish(figure, title, footer, path)


def _stack(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the bars of one panel."""
    left = [0.0] * len(results)
    for part, colour in PARTS.items():
        widths = [sum(size for name, size in r["items"].items() if part_of(name) == part) for r in results]
        if part == CONTEXT_PART:
            widths = [r["predicted_device_gib"] - r["predicted_allocated_gib"] for r in results]
        axes.barh(range(len(results)), widths, BAR, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths)]
    for place, result in enumerate(results):
        _measured(axes, place, result, left[place])
    axes.set_yticks(range(len(results)), [_label(result["case"]) for result in results], fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    highest = max([*left, *(result.get("device_gib") or 0 for result in results)])
    axes.set_xlim(0, 1.6 * highest)  # room for what is written behind the longest bar


def _label(case: str) -> str:
    """Return a case in two lines: what it is, and what is special about it."""
    geometry, adapter, *changes = case.split(":", 2)
    return "\n".join([f"{geometry}, {adapter}", *(text.replace(",", ", ") for text in changes)])


def part_of(item: str) -> str:
    """Return which of :data:`PARTS` an item of a plan belongs to."""
    starts = {
        "linear layers": "linear layers", "embedding": "embedding, head, norms", "vision": "vision tower",
        "adapter": "adapter, gradients, optimizer", "their gradients": "adapter, gradients, optimizer",
        "optimizer": "adapter, gradients, optimizer", "layer inputs": "layer inputs", "the window": "layer inputs",
    }  # fmt: skip
    return next((part for start, part in starts.items() if item.startswith(start)), "at work")


def _measured(axes: Axes, place: int, result: Mapping[str, Any], end: float) -> None:
    """Mark the measured peaks of a case, and write them behind its bar."""
    text = f"{result['predicted_allocated_gib']:.2f} foretold"
    device = result.get("device_gib")
    if "error" in result:
        text = f"{text}; {str(result['error'])[:50]}"
    elif (allocated := result.get("allocated_gib")) is not None:
        axes.plot([allocated, allocated], [place - BAR / 2, place + BAR / 2], color=INK, lw=2)
        text = f"{allocated:.2f} ({text})"
        if device is not None:
            axes.plot([device], [place], "o", markerfacecolor="none", markeredgecolor=INK)
            text += f", {device:.2f} in all"
    behind = (max(end, device or 0), place)
    axes.annotate(text, behind, (8, 0), textcoords="offset points", va="center", color=INK, fontsize=8)


def loss_curves(runs: Mapping[str, Mapping[str, Any]], footer: Sequence[str], path: Path) -> None:
    """Draw two trainers' losses over the steps, above how far they are from the other side's in fp32.

    :param runs: by what a column is headed with; each has ``lavintk``, ``hf``, ``fp32`` and ``other_start``: losses in
        nats per trained token; ``fp32`` and ``hf`` are equal where both computed in it.
    """
    figure = _figure(5.2 * len(runs) + 0.6, 6.0)
    axes = figure.subplots(2, len(runs), squeeze=False, sharex="col", height_ratios=[2, 1])
    for (upper, lower), (heading, curves) in zip(axes.T, runs.items()):
        steps = range(1, len(curves["hf"]) + 1)
        in_fp32 = curves["hf"] == curves["fp32"]
        upper.plot(steps, curves["other_start"], color="#c3c7cd", lw=1.5, label="HF + PEFT in fp32, another start")
        if not in_fp32:
            upper.plot(steps, curves["fp32"], color=INK, lw=1, label="HF + PEFT in fp32, same start")
        upper.plot(steps, curves["hf"], color="#d98032", lw=3 if in_fp32 else 1.5, label="HF + PEFT")
        upper.plot(steps, curves["lavintk"], color="#0b6e99", lw=1.3, ls=(0, (4, 2)), label="lavintk, same start")
        upper.set_title(heading, loc="left", fontsize=10, fontweight="bold", color=INK)
        upper.set_ylabel("loss (nats per trained token)")
        upper.set_ylim(bottom=0)
        upper.legend(frameon=False)
        shown = {"other_start": ("#c3c7cd", "another start"), "lavintk": ("#0b6e99", "lavintk")}
        if not in_fp32:
            shown["hf"] = ("#d98032", "HF + PEFT")
        lower.axhline(0, color=PALE, lw=0.8)
        bound = 1e-6
        for name, (color, label) in shown.items():
            difference = [own - wide for own, wide in zip(curves[name], curves["fp32"])]
            lower.plot(steps, difference, color=color, lw=1.5, label=label)
            bound = max(bound, 1.6 * max(map(abs, difference)))  # room for the legend
        lower.set_xlabel("optimizer step")
        lower.set_ylabel("from fp32 (nats)")
        lower.legend(frameon=False, ncols=3)
        lower.set_ylim(-bound, bound)
        lower.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, "The same learning: LoRA with lavintk and with transformers + PEFT", footer, path)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that lays itself out; no window system is needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _panels(bars: Sequence[int], footer_lines: int, same_scale: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel of horizontal bars below each other, as high as its bars need."""
    figure = _figure(9.0, 0.9 + 0.17 * footer_lines + sum(0.36 * count + 0.42 for count in bars))
    panels = figure.subplots(len(bars), 1, squeeze=False, sharex=same_scale, height_ratios=list(bars))[:, 0]
    for axes in panels:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
    return figure, list(panels)


def _finish(figure: Figure, title: str, footer: Sequence[str], path: Path) -> None:
    """Put title and footer around the panels and write the file."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, color=INK)
    figure.supxlabel("\n".join(footer), x=0.01, ha="left", fontsize=7.5, color=PALE)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")
