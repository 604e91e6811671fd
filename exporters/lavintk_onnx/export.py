"""From a run to a folder: which grid, which form of the adapter, then graphs, settings and provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import torch

from lavintk import __version__
from lavintk.errors import ModelError, OptionsError, RunError
from lavintk.merge import LANGUAGE, LayerUpdates, merged_weight
from lavintk.models.vocabulary import EMBEDDING, HEAD
from lavintk.registry import Choice
from lavintk_onnx.decoder import PREFIX, DecoderPlan, DecoderWriter, ErrorSum, Quantizers
from lavintk_onnx.embedding import StoredTable, lookup, store_table, write_embedding_graphs
from lavintk_onnx.folder import FolderDescription, write_folder
from lavintk_onnx.graph import DataFile, GraphBuilder
from lavintk_onnx.grids import Grid, StoredMatrix, encode, encode_layer, encode_table, quantizer_for
from lavintk_onnx.options import OnnxOptions
from lavintk_onnx.updates import Trained, effective_weight
from lavintk_onnx.vision import VisionGrid, write_vision

if TYPE_CHECKING:
    import onnx_ir as ir

    from lavintk.contracts import AffineUpdate
    from lavintk.layers import FrozenLinear
    from lavintk.models.build import Assembly
    from lavintk.models.multimodal import MultimodalModel
    from lavintk.run import Run

FORMAT = 1
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "int4": "_q4", "nf4": "_bnb4"}
"""What the names of graphs end in, as transformers.js looks for them."""
TRAINED_SCHEMES = {"int4-block": "int4", "nf4": "nf4", "int8-row": "int8"}
"""Grids on which a trained base can be copied, by what its layers call their storage."""
SCHEMES_OF_INT4 = [scheme for scheme, grid in TRAINED_SCHEMES.items() if grid == "int4"]
BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1 + 5 / 32, "int4": 0.5 + 4.5 / 32, "nf4": 0.5 + 4 / 64}
"""Of a weight, with its share of the scale and the zero point of its block."""
LONGEST_CONTEXT = 32768
CLEARLY_LESS = 0.9
"""A side path costs time, so it has to leave at most this share of the error that merging leaves."""
NEGLIGIBLE = 1e-3
"""Relative error of weights below which less does not show: fp16 leaves 2e-4, the nearest coarser grid, int8, 5e-3."""


class OnnxExporter:
    """Writes the folder; see :class:`lavintk.contracts.Exporter`, and ``ComparedExporter`` there."""

    runs_here = True

    def __init__(self, options: OnnxOptions) -> None:
        self.options = options
        for package in ("onnx", "onnx_ir"):  # used late; that one is missing should show before a model is loaded
            import_module(package)

    def export(self, run: Run, out: Path) -> None:
        """Write ``run`` into the new folder ``out``.

        :raises ModelError: the architecture or the adapter has no form in ONNX.
        """
        (out / "onnx").mkdir()
        self._check_data(run)
        stream = not self._rounds_with_data(run)
        assembly = run.load("cpu", stream=stream).assembly
        model = assembly.model
        if stream:  # the model itself will not be run
            _narrow_tables(model, run.trained_in())
        _check_manner(model)
        _check_patterns(self.options.patterns(), model.linears())
        grid, reason = self._grid(model, run.recipe.data.train is not None)
        click.echo(f"linear layers: {grid} ({reason})")
        updates = LayerUpdates(model)
        merge, why = self._adapter_form(model, grid, updates)
        if model.adapter is not None:
            click.echo(f"adapter: {'merge' if merge else 'side'} ({why})")
        rounding = self._round(run, model, grid, merge)
        if rounding.trained is not None:
            updates = LayerUpdates(model)  # of the layers and the adapter as they are now
        tables = _Tables.of(self.options, grid, run.recipe.embed_quant.name)
        writing = _Writing(self.options, assembly, grid, tables, merge, out, rounding)
        writing.write(updates)
        _describe(run, assembly, writing, reason, why)

    def bytes_needed(self, run: Run, outline: MultimodalModel) -> int:
        """Return the bytes of the weights; see :class:`lavintk.contracts.SizedExporter`.

        Where LaVIN's modalities are merged, those of the second decoder come on top.
        """
        trained = run.recipe.quant.name
        stays = trained == "int4" or (trained == "nf4" and self.options.target == "cuda")
        grid: Grid = cast("Grid", trained) if stays else "int8"
        grid = grid if self.options.quant == "keep" else self.options.quant
        seeing, patterns = outline.vision is not None, self.options.patterns()
        tables = _Tables.of(self.options, grid, run.recipe.embed_quant.name)
        needed = 0.0
        for name, layer in outline.linears().items():
            on = tables.vision if not name.startswith(PREFIX) else _grid_of(name, patterns, grid)
            needed += layer.out_features * layer.in_features * BYTES[on]
        config = outline.language.config
        rows = int(config.vocab_size) * outline.hidden_size
        needed += rows * BYTES[tables.embed]
        if seeing or not config.tie_word_embeddings or tables.embed != tables.head:
            needed += rows * BYTES[tables.head]
        return int(needed)

    def _check_data(self, run: Run) -> None:
        """Refuse what needs training data where there is none.

        :raises RunError: says which options that are.
        """
        if run.recipe.data.train is None and (asked := self.options.asked_of_data()):
            raise RunError(
                f"{' and '.join(asked)}: that needs training data, and a model that was not trained here has none. "
                "Leave it out."
            )

    def _rounds_with_data(self, run: Run) -> bool:
        """Whether some layers may be rounded with training data, for which the whole model has to be in memory."""
        rows = self.options.calibrate if run.recipe.quant.name == "int4" else self.options.calibration_rows
        kept = run.recipe.quant.name if self.options.quant == "keep" else self.options.quant
        wanted = {kept, *(grid for _, grid in self.options.patterns())}
        return bool(rows or self.options.retune) and "int4" in wanted and run.recipe.data.train is not None

    def _round(self, run: Run, model: MultimodalModel, grid: Grid, merge: bool) -> _Rounding:
        """Round the layers that go onto int4 with the training data in mind, and no others.

        :raises RunError: that was asked for, and there are none.
        """
        patterns, linears = self.options.patterns(), model.linears()
        on_int4 = _scheme(linears) in SCHEMES_OF_INT4
        names = [n for n in linears if n.startswith(PREFIX) and _grid_of(n, patterns, grid) == "int4"]
        if on_int4 and not merge:  # codes are copied
            names = []
        if not names and (asked := self.options.asked_of_data()):
            raise RunError(
                f"{' and '.join(asked)}: that is for linear layers that are rounded to int4 anew, and here are none: "
                f"they {'keep the int4 codes of the training' if on_int4 else f'ship as {grid}'}. Leave it out"
                + ("." if on_int4 else ", or export with --quant int4.")
            )
        # an int4 base with the adapter folded in is rounded layer by layer, by the weights alone, unless asked for
        rows = (self.options.calibrate or 0) if on_int4 else self.options.calibration_rows
        if not names or not (rows or self.options.retune):
            return _Rounding()
        if run.recipe.data.train is None:
            click.echo("int4 is rounded without calibration: there is no training data, as the model is not a run's")
            return _Rounding()
        from rich.console import Console

        from lavintk.requantize import as_it_is, requantize_run, requantize_run_merged

        if merge:
            report, rounded = requantize_run_merged(
                run, Choice("int4"), rows=rows, layers=names, only_changed=on_int4, console=Console()
            )
            return _Rounding(asdict(report), rounded)
        updates = model.adapter.affine_updates(LANGUAGE) if model.adapter is not None else ()
        trained = Trained({n: as_it_is(linears[n]) for n in names}, {(u.linear, u.condition): u for u in updates})
        report = requantize_run(
            run, Choice("int4"), rows=rows, retune_steps=self.options.retune, layers=names, console=Console()
        )
        return _Rounding(asdict(report), {}, trained)

    def _grid(self, model: MultimodalModel, was_trained: bool) -> tuple[Grid, str]:
        """Return the grid and why.

        :param was_trained: whether the base took part in a training here.
        """
        scheme = _scheme(model.linears())
        trained = TRAINED_SCHEMES.get(scheme)
        if self.options.quant != "keep":
            slow = "; on a CPU each product unpacks the whole weight, many times slower than int4" * (
                self.options.quant == "nf4" and self.options.target == "cpu"
            )
            found = f"; trained on {trained or scheme}" if was_trained else ""
            return self.options.quant, f"as asked{found}{slow}"
        if not was_trained:
            return "int8", "it keeps what the weights say and is fast on a CPU"
        if trained == "int4":
            return "int4", "the grid it was trained on, copied"
        if trained == "nf4":
            if self.options.target == "cuda":
                return "nf4", "the grid it was trained on, copied; the target is cuda, which has kernels for it"
            return "int8", "it was trained on nf4, which int8 keeps and which is slow on a CPU itself, the target"
        foreign = "" if trained or scheme == "dense" else ", which ONNX Runtime has no kernels for: it is encoded anew"
        return "int8", f"the base was trained as {trained or scheme}{foreign}"

    def _adapter_form(self, model: MultimodalModel, grid: Grid, updates: LayerUpdates) -> tuple[bool, str]:
        """Return whether to merge, and why: what leaves the weights nearer to the trained ones in the first layer.

        Both forms are measured against the weights that were trained, rounded without data: before anything is rounded.
        """
        if model.adapter is None or self.options.adapter != "auto":
            return self.options.adapter == "merge" and model.adapter is not None, "as asked"
        if self.options.retune:
            return False, "what is tuned on the new grid is the adapter beside it"
        if any(u.up.numel() + u.down.numel() >= len(u.up) * u.down.shape[1] for u in updates.coming):
            return True, "beside the base it would take no less room than the weights"
        patterns = self.options.patterns()
        merged, side = _errors_of_forms(model.linears(), updates.coming, lambda name: _grid_of(name, patterns, grid))
        if merged is None or side is None:
            return True, "it changes no linear layer"
        found = f"relative error of changed weights {merged:.1e} merged, {side:.1e} beside the base"
        shares = len(model.adapter.conditions) > 1  # merged, each modality has its own copy of what the adapter changes
        if max(merged, side) < NEGLIGIBLE:
            gain = "both modalities share all weights beside it" if shares else "merged is faster and smaller"
            return not shares, f"{found}: both negligible; {gain}"
        merge = not side < CLEARLY_LESS * merged
        if merge and shares and side <= merged * 1.001:
            return False, f"{found}; beside it, both modalities share all weights"
        return merge, found


def _narrow_tables(model: MultimodalModel, trained_in: torch.dtype | None) -> None:
    """Hold embedding and head in the type of the training, to which they are rounded: the same values in half the room.

    :param trained_in: None leaves them as they are.
    """
    for name in (EMBEDDING, HEAD) if trained_in is not None else ():
        table = getattr(model.language.get_submodule(name), "weight", None)
        if isinstance(table, torch.nn.Parameter):
            table.data = table.data.to(trained_in)  # in place: tied, both are one


def _errors_of_forms(
    linears: Mapping[str, FrozenLinear], updates: Sequence[AffineUpdate], grid_of: Callable[[str], Grid]
) -> tuple[float | None, float | None]:
    """Return the relative error of the weights that ``updates`` change, merged and side by side."""
    merged, side = ErrorSum(), ErrorSum()
    for update in updates:
        layer, grid = linears[update.linear], grid_of(update.linear)
        quantize = quantizer_for(grid)
        base = effective_weight(layer, None)
        exact = merged_weight(base, [update])
        merged.add(encode(exact, grid, quantize), exact, exact)
        side.add(encode_layer(layer, grid, quantize), base, exact)
    return merged.relative, side.relative


@dataclass(frozen=True)
class _Rounding:
    """What was rounded with training data before anything is written.

    :param report: what :mod:`lavintk.requantize` found, or None where it had nothing to do.
    :param merged: the rounded layers with the adapter in them; see :attr:`DecoderPlan.rounded`.
    :param trained: what the model in memory was before, where that was rounded itself.
    """

    report: dict[str, Any] | None = None
    merged: Mapping[tuple[str, str], FrozenLinear] = field(default_factory=dict)
    trained: Trained | None = None


def _scheme(linears: Mapping[str, FrozenLinear]) -> str:
    """Return how the linear layers of the language model are stored."""
    return next(layer for name, layer in linears.items() if name.startswith(PREFIX)).packed().scheme


def _check_patterns(patterns: Sequence[tuple[str, str]], linears: Mapping[str, FrozenLinear]) -> None:
    """Refuse patterns of ``mixed`` that match no layer.

    :raises OptionsError: with all of them, and what names look like.
    """
    names = [_short(name) for name in linears if name.startswith(PREFIX)]
    idle = [pattern for pattern, _ in patterns if not any(fnmatch(name, pattern) for name in names)]
    if idle:
        raise OptionsError(
            "exporter 'onnx'",
            [f"mixed: {pattern!r} matches no linear layer" for pattern in idle],
            f"Names are {names[0]} to {names[-1]}, in each layer {', '.join(_leaves(names))}; * stands for anything.",
        )


def _leaves(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".", 2)[2] for name in names))


def _check_manner(model: MultimodalModel) -> None:
    """Refuse what the graphs cannot express.

    :raises ModelError: tokens are decoded at other positions than they would have in a prompt.
    """
    if model.manner.decode_shift:
        raise ModelError(
            "this run imitates LaVIN's generator, which decodes at shifted positions (adapter option compat=lavin); "
            "the exported graphs count positions themselves and cannot. Train or import with compat=none."
        )


@dataclass(frozen=True)
class _Tables:
    """Grids of what is not a linear layer of the language model."""

    embed: Grid
    head: Grid
    vision: VisionGrid

    @classmethod
    def of(cls, options: OnnxOptions, grid: Grid, trained: str) -> _Tables:
        """Return the grids that ``options`` ask for.

        :param trained: the quantizer of the tables in training.
        """
        # only fp32 folders have to be exact; others keep the table in 8 bits, which moves logits by little, or on the
        # 4-bit grid that it was trained on
        compact: Grid = "int4" if trained == "int4" else "int8"
        plain: Grid = grid if grid in ("fp32", "fp16") else compact
        embed: Grid = plain if options.embed_quant == "auto" else options.embed_quant
        head: Grid = embed if options.head_quant == "auto" else options.head_quant
        vision: VisionGrid = "fp32" if grid == "fp32" else "fp16"
        return cls(embed, head, vision if options.vision_quant == "auto" else options.vision_quant)


def _grid_of(linear: str, patterns: Sequence[tuple[str, str]], otherwise: Grid) -> Grid:
    """Return the grid of a linear layer of the language model."""
    short = _short(linear)
    return next((cast("Grid", grid) for pattern, grid in patterns if fnmatch(short, pattern)), otherwise)


def _short(linear: str) -> str:
    """Return the name that patterns match."""
    return linear.replace(PREFIX, "layers")


class _Writing:
    """Writes the graphs of one folder."""

    def __init__(
        self, options: OnnxOptions, assembly: Assembly, grid: Grid, tables: _Tables, merge: bool, out: Path,
        rounding: _Rounding,
    ) -> None:  # fmt: skip
        self.options, self.assembly, self.model, self.grid, self.merge = options, assembly, assembly.model, grid, merge
        self.rounding = rounding
        self.folder, self.suffix = out / "onnx", SUFFIXES[grid]
        self.out = out
        config = self.model.language.config
        longest = int(getattr(config, "max_position_embeddings", LONGEST_CONTEXT))
        self.context = min(options.context_length or LONGEST_CONTEXT, longest)
        self.embed, self.head, self.vision = tables.embed, tables.head, tables.vision
        self.graphs: dict[str, str] = {}
        self.decoders: dict[str, str] = {}
        self.error: float | None = None
        self.copied = False

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one table on one grid that both operators read."""
        whole_blocks = self.model.hidden_size % 64 == 0  # packed zero points of a row fill whole bytes
        quantized = self.embed in ("int4", "int8") and whole_blocks
        config = self.model.language.config
        return bool(config.tie_word_embeddings) and self.embed == self.head and (quantized or self.embed[:2] == "fp")

    def write(self, updates: LayerUpdates) -> None:
        """Write decoder, embedding and vision."""
        seeing = self.model.vision is not None
        name = f"{'decoder_model_merged' if seeing else 'model'}{self.suffix}.onnx"
        with DataFile(self.folder / f"{name}_data") as data:
            head, embedding = None, None
            if not seeing:
                head, embedding = self._tables(data)
            writer = DecoderWriter(self.model, self._plan(), data, updates, embedding)
            with click.progressbar(length=len(self.model.layers), label="decoder") as bar:
                writer.write(head, lambda done, total: bar.update(1))
        self.error, self.copied = writer.error.relative, writer.copied
        for condition, graph in writer.graphs.items():
            file = f"decoder_text{self.suffix}.onnx" if condition == "text" and seeing else name
            if not seeing and condition == "image":
                continue
            graph.builder.save(self.folder / file)
            self.decoders[condition if seeing else "all"] = f"onnx/{file}"
        self.graphs["decoder"] = f"onnx/{name}"
        if seeing:
            self._write_seeing()

    def _plan(self) -> DecoderPlan:
        grids: tuple[Grid, ...] = ("int4", "nf4")
        quantizers: Quantizers = {grid: quantize for grid in grids if (quantize := quantizer_for(grid))}
        patterns = self.options.patterns()

        def grid_of(linear: str) -> Grid:
            return _grid_of(linear, patterns, self.grid)

        level = self.options.accuracy_level
        exact = self.grid == "fp32"
        return DecoderPlan(
            grid_of, self.head, self.merge, level, self.context, quantizers, self.rounding.merged,
            self.rounding.trained, exact_norms=exact,
        )  # fmt: skip

    def _tables(self, data: DataFile) -> tuple[StoredMatrix | None, Callable[[GraphBuilder, ir.Value], ir.Value]]:
        """Store the embedding of a text model; return the head if it is the same table, and what looks ids up."""
        table = encode_table(self.model, EMBEDDING, self.embed, quantizer_for(self.embed))
        stored = store_table(data, table)
        head = None
        if self.tied and self.model.hidden_size % max(1, 2 * stored.block_size) == 0:
            head = _as_head(stored)
        return head, lambda graph, ids: lookup(graph, ids, stored)

    def _write_seeing(self) -> None:
        assert self.assembly.images is not None
        embed_suffix, vision_suffix = SUFFIXES[self.embed], SUFFIXES[self.vision]
        files = {
            "embed_tokens": f"embed_tokens{embed_suffix}.onnx",
            "embedding": f"embedding{embed_suffix}.onnx",
            "vision": f"vision_encoder{vision_suffix}.onnx",
        }
        self.graphs |= {role: f"onnx/{file}" for role, file in files.items()}
        table = encode_table(self.model, EMBEDDING, self.embed, quantizer_for(self.embed))
        write_embedding_graphs(
            table, self.folder / files["embed_tokens"], self.folder / files["embedding"],
            image_id=int(self.model.language.config.vocab_size),
        )  # fmt: skip
        images = self.assembly.images
        write_vision(
            self.model, self.folder / files["vision"], height=images.height, width=images.width, grid=self.vision
        )

    def data_files(self) -> dict[str, int]:
        """Return the number of data files of each graph that has one of its own name."""
        return {path: 1 for path in self.graphs.values() if (self.out / f"{path}_data").is_file()}


def _as_head(table: StoredTable) -> StoredMatrix:
    """Return an embedding table as the matrix of the output head: the same bytes."""
    rows, hidden = table.shape
    if "values" in table.parts:
        return StoredMatrix(table.grid, table.shape, 0, dict(table.parts), rows_first=True)
    blocks = hidden // table.block_size
    codes = table.parts["codes"].reshaped(
        "lm_head.codes", (rows, blocks, table.parts["codes"].nbytes // rows // blocks)
    )
    return StoredMatrix(table.grid, table.shape, table.block_size, {**table.parts, "codes": codes})


def _describe(run: Run, assembly: Assembly, writing: _Writing, reason: str, why: str) -> None:
    """Write the settings of the clients and ``lavintk_export.json``."""
    model, template, out, report = assembly.model, assembly.template, writing.out, writing.rounding.report
    description = FolderDescription(
        config=model.language.config,
        tokenizer=assembly.tokenizer,
        template=template.kind,
        stop_ids=template.stop_ids,
        context_length=writing.context,
        graphs=writing.graphs,
        data_files=writing.data_files(),
        system=template.system,
        images=assembly.images,
        visual_tokens=model.visual_tokens,
        vision=model.vision.model.config if model.vision else None,
    )
    write_folder(out, description)
    kind = template.kind if template.kind in ("chat", "plain", "lavin") else "template.jinja"
    if kind == "template.jinja":
        (out / kind).write_text(Path(template.kind).expanduser().read_text(encoding="utf-8"), encoding="utf-8")
    content = {
        "format": FORMAT,
        "lavintk": __version__,
        "graphs": {
            "decoder": writing.decoders,
            "embed_tokens": writing.graphs.get("embed_tokens"),
            "vision": writing.graphs.get("vision"),
        },
        "prompt": {"template": kind, "system": template.system, "visual_tokens": model.visual_tokens},
        "image": None if assembly.images is None else asdict(assembly.images),
        "quant": {
            "grid": writing.grid,
            "trained": None if run.recipe.data.train is None else str(run.recipe.quant),
            "copied": writing.copied and report is None,
            "calibrated": report is not None and report["calibrated"] > 0,
            "reason": reason,
            "embed": writing.embed,
            "head": writing.head,
            "vision": writing.vision if model.vision else None,
            "mixed": writing.options.mixed or None,
            "accuracy_level": writing.options.accuracy_level,
        },
        "adapter": None
        if run.recipe.adapter is None
        else {
            "name": str(run.recipe.adapter),
            "form": "merge" if writing.merge else "side",
            "reason": why,
            "weight_error": writing.error,
        },
        "base": assembly.base,
        "run": {
            "name": run.recipe.name,
            "started": run.manifest.get("started"),
            "steps": run.manifest.get("steps"),
            "data": run.manifest.get("data"),
            "versions": run.manifest.get("versions"),
        },
        "evaluation": {
            "data": None if run.recipe.data.test is None else _plain(run.recipe.data.test),
            "split": run.recipe.data.test_split,
            "name": _plain(run.recipe.evaluation.name),
            "max_new_tokens": run.recipe.evaluation.max_new_tokens,
        },
        "report": {} if report is None else {"requantized": report},
    }
    (out / "lavintk_export.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _plain(choice: Choice) -> dict[str, Any]:
    return {"name": choice.name, **choice.options}
