"""A run on disk: what was asked, what happened, what came out; and the model it holds, ready to use."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.errors import CheckpointError, RunError
from lavintk.recipe import Recipe, make_recipe, read_recipe
from lavintk.registry import Choice
from lavintk.scoring import check_numbers, choose_test

if TYPE_CHECKING:
    import torch

    from lavintk.contracts import EvaluationResult
    from lavintk.data.records import ImageSource, Record
    from lavintk.generate import Sampling
    from lavintk.models.build import Assembly

RECIPE, MANIFEST, METRICS, MODEL = "recipe.yaml", "manifest.json", "metrics.jsonl", "model"
PARTIAL_MANIFEST, PREDICTIONS, CHECKPOINTS = f"{MANIFEST}.partial", "predictions_{}.jsonl", "checkpoints"
PACKAGES = ("lavintk", "torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "pluggy", "numpy")


class Run:
    """The folder of a run.

    ``manifest`` holds versions, hashes, counts, peak memory and evaluation figures; it is written with
    :meth:`record`.
    """

    def __init__(self, folder: Path, recipe: Recipe, manifest: dict[str, Any]) -> None:
        self.folder, self.recipe, self.manifest = folder, recipe, manifest
        self._assembly: Assembly | None = None

    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> Run:
        """Make a new run folder.

        :raises RunError: the folder is in use or cannot be made.
        """
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(_about_folder_in_use(folder))
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run's folder {folder} cannot be made: {error}. Choose another --out.") from error
        manifest = {
            "status": "started",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": recipe.dump(),
            "versions": versions(),
        }
        run = cls(folder, recipe, manifest)
        try:
            (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            run.record()
        except OSError as error:
            run.discard()
            raise RunError(f"{folder} cannot be written to: {error}. Choose another --out.") from error
        return run

    def discard(self) -> bool:
        """Remove the folder of a run that came to nothing; return whether it is gone.

        Only what a run writes before its first step is removed; with anything else in it the folder stays.
        """
        if not self.folder.is_dir():
            return True
        found = {path.name for path in self.folder.iterdir() if path.is_file()}
        trained = any((self.folder / name).exists() for name in (CHECKPOINTS, MODEL))
        if trained or not found <= {RECIPE, MANIFEST, PARTIAL_MANIFEST, PREDICTIONS.format("before")}:
            return False
        shutil.rmtree(self.folder, ignore_errors=True)  # loggers keep their files in folders of their own
        return not self.folder.exists()

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run folder without loading the model.

        :raises RunError: the folder or one of its files is missing or broken.
        """
        missing = [name for name in (RECIPE, MANIFEST) if not (folder / name).is_file()]
        if missing:
            found = "does not exist" if not folder.exists() else f"lacks {' and '.join(missing)}"
            found = "is a file" if folder.is_file() else found
            raise RunError(f"{folder} {found}, so it is no run; `lavintk train` makes one under runs/")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{folder / MANIFEST} is not valid JSON: {error}") from error
        if not isinstance(manifest, dict):
            raise RunError(f"{folder / MANIFEST} must hold a JSON object, found {type(manifest).__name__}")
        return cls(folder, make_recipe(read_recipe(str(folder / RECIPE))), manifest)

    def record(self, **entries: Any) -> None:
        """Add entries to the manifest and write it, replacing the old file in one step."""
        text = json.dumps({**self.manifest, **entries}, indent=2, default=str)
        self.manifest = json.loads(text)  # what is in memory is what is on disk
        partial = self.folder / PARTIAL_MANIFEST
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self.folder / MANIFEST)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @property
    def assembly(self) -> Assembly:
        """The trained model with tokenizer, template and image processor; loaded on first use."""
        if self._assembly is None:
            self.load()
        assert self._assembly is not None
        return self._assembly

    def load(self, device: str | None = None, *, stream: bool = False) -> Run:
        """Load the frozen base, quantize it as in training, and put the trained weights in.

        :param device: overrides the recipe's, for example ``"cpu"``.
        :param stream: hold no linear layers of the language model; each is read again whenever it is needed.
        :raises RunError: the run holds no trained weights, or a frozen model is not the one it was trained on.
        :raises CheckpointError: the weights cannot be read or do not fit.
        """
        from lavintk.checkpoints import how_to_go_on, load_weights
        from lavintk.devices import pick_device, pick_precision
        from lavintk.models.build import build
        from lavintk.plugins import installed_plugins

        weights = self.folder / MODEL
        if not weights.is_dir():
            raise RunError(f"{self.folder} holds no trained weights yet. {how_to_go_on(self.folder)}")
        target = pick_device(device or self.recipe.train.device)
        dtype = pick_precision(self.recipe.train.precision, target)
        assembly = build(
            self.recipe, installed_plugins(), target, dtype,
            check_base=self.check_base, trained_in=self.trained_in(), trained_on=self.trained_on(), stream=stream,
            outside="none" if stream or target.type != "cuda" else self.recipe.train.stream,
            resident_layers=self.recipe.train.resident_layers,
        )  # fmt: skip
        try:
            load_weights(assembly.model, weights)
        except CheckpointError as error:
            advice = f"{error.advice}\n{how_to_go_on(self.folder)}"
            raise CheckpointError(error.subject, error.faults, advice.strip()) from error
        assembly.model.eval()
        self._assembly = assembly
        return self

    def trained_in(self) -> torch.dtype | None:
        """Return the compute type of the training, or None where none took place here."""
        import torch

        name = self.manifest.get("precision")
        return getattr(torch, name) if name in ("float32", "float16", "bfloat16") else None

    def trained_on(self) -> str | None:
        """Return the kind of device of the training, ``"cpu"`` or ``"cuda"``, or None where that is not known."""
        kind, in_words = self.manifest.get("device_type"), self.manifest.get("device")
        if kind is None and in_words is not None:  # the manifest is older than this entry
            kind = "cpu" if str(in_words).startswith("CPU, ") else "cuda"
        return kind if kind in ("cpu", "cuda") else None

    def check_base(self, found: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse frozen models that are not those the run was trained on: its weights mean nothing to others.

        :param found: source and SHA-256 by role, as in :class:`~lavintk.models.build.Assembly`.
        :raises RunError: with both hashes of each model that differs.
        """
        before = self.manifest.get("base", {})
        now = {role: found[role] for role in before if role in found}
        changed = about_other_bases(before, now, "trained on", "found")
        if changed:
            raise RunError(
                "\n".join([f"{self.folder} was trained on other weights than its recipe now leads to:", *changed])
                + f"\nPut the old model back, or name its place in {self.folder / RECIPE} (model.language, "
                f"model.vision). Were the same weights only stored anew, delete 'base' from {self.folder / MANIFEST}."
            )

    def use(self, assembly: Assembly) -> None:
        """Take over a model that is already in memory."""
        self._assembly = assembly

    def generate(
        self,
        prompt: str,
        image: ImageSource | str | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> str:
        """Answer one prompt, with an image if given.

        :param image: path or encoded bytes of an image.
        """
        from lavintk.answer import Answerer
        from lavintk.data.records import Message, Record
        from lavintk.generate import Sampling as Greedy

        images = () if image is None else (Path(image) if isinstance(image, str) else image,)
        record = Record("prompt", (Message("user", prompt),), images)
        pieces = Answerer(self.assembly, 1).stream(record, max_new_tokens=max_new_tokens, sampling=sampling or Greedy())
        return "".join(pieces)

    def evaluate(
        self,
        data: str | Choice | None = None,
        *,
        split: str | None = None,
        evaluation: str | Choice | None = None,
        scoring: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
    ) -> EvaluationResult:
        """Score the trained model; without arguments, on the recipe's test data.

        :param evaluation: by default the one called like the format of ``data``, where there is one, else the recipe's.
        :param scoring: the evaluation's option of this name, for example ``"likelihood"``.
        :raises RunError: neither ``data`` nor the recipe names records to answer, or a number is below 1.
        """
        check_numbers(max_new_tokens=max_new_tokens, batch_size=batch_size)
        settings = self.recipe.evaluation
        chosen, scorer = choose_test(
            data, evaluation, scoring,
            own_data=self.recipe.data.test, own_evaluation=settings.name, owner="the recipe",
        )  # fmt: skip
        return evaluate(
            self.assembly,
            load_records(chosen, split or self.recipe.data.test_split),
            scorer,
            max_new_tokens=max_new_tokens or settings.max_new_tokens,
            batch_size=batch_size or settings.batch_size,
        )


def load(folder: str | os.PathLike[str], *, device: str | None = None) -> Run:
    """Open a finished run and load its model.

    :raises RunError: no run there, or nothing trained yet.
    """
    return Run.open(Path(folder)).load(device)


def about_other_bases(
    one: Mapping[str, Mapping[str, str]], other: Mapping[str, Mapping[str, str]], said_of_one: str, said_of_other: str
) -> list[str]:
    """Return an indented line for each frozen model whose hash differs or that only one side has.

    :param one: source and SHA-256 by role, as ``other``.
    :param said_of_one: words in front of its hash, for example ``"trained on"``.
    """
    nothing = {"source": "none", "sha256": "none"}
    lines = []
    for role in sorted({*one, *other}):
        ours, theirs = {**nothing, **one.get(role, {})}, {**nothing, **other.get(role, {})}
        if ours["sha256"] != theirs["sha256"]:
            lines.append(
                f"  - {role}: {said_of_one} sha256 {ours['sha256']} ({ours['source']}),\n"
                f"    {said_of_other} sha256 {theirs['sha256']} ({theirs['source']})"
            )
    return lines


def _about_folder_in_use(folder: Path) -> str:
    from lavintk.checkpoints import checkpoints

    if not all((folder / name).is_file() for name in (RECIPE, MANIFEST)):
        return f"{folder} exists and is not empty; choose another --out."
    if checkpoints(folder):
        return f"{folder} holds a run already; choose another --out, or go on with: lavintk train --resume {folder}"
    return f"{folder} holds a run that has no checkpoint to go on from; delete it, or choose another --out."


def load_records(choice: Choice, split: str) -> list[Record]:
    """Read the records that ``choice`` names.

    :raises DataError: every fault of the file.
    """
    from lavintk.plugins import installed_plugins

    return installed_plugins().datasets.create(choice).load(split)


def evaluate(
    assembly: Assembly, records: list[Record], evaluation: Choice, *, max_new_tokens: int, batch_size: int
) -> EvaluationResult:
    """Score a loaded model on records.

    :raises OutOfMemoryError: the batch is too large for the device.
    """
    from lavintk.answer import Answerer
    from lavintk.devices import enough_memory
    from lavintk.fitting import largest_part
    from lavintk.plugins import installed_plugins

    def advice() -> str:
        lower = f"Lower the evaluation's batch_size (now {batch_size}) or max_new_tokens (now {max_new_tokens})."
        return f"{largest_part(assembly.model)} {lower}"

    scorer = installed_plugins().evaluations.create(evaluation)
    with enough_memory(assembly.model.device, "while answering", advice):
        return scorer.evaluate(Answerer(assembly, batch_size), records, max_new_tokens=max_new_tokens)


def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
