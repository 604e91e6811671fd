"""A recipe says everything about a run: model, data, adapter, optimizer, schedule.

It is a YAML file; flags and ``--set a.b=c`` override it. The whole recipe is checked before anything is loaded,
and all faults are reported together. The shipped recipes lie in ``lavintk/recipes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from lavintk.errors import LavintkError, OptionsError, RecipeError, did_you_mean
from lavintk.plugins import Plugins
from lavintk.registry import Choice


def _to_choice(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return Choice.parse(value)
        except OptionsError as error:
            raise ValueError("; ".join(error.faults)) from error
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Choice(value["name"], {key: option for key, option in value.items() if key != "name"})
    if isinstance(value, Choice):
        return value
    raise ValueError("must be a name, 'name:option=value', or a mapping with the key 'name'")


def _from_choice(choice: Choice) -> Any:
    return {"name": choice.name, **choice.options} if choice.options else choice.name


_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""Numbers that YAML 1.1 takes for text, such as ``1e-3``."""

PluginChoice = Annotated[Choice, BeforeValidator(_to_choice), PlainSerializer(_from_choice)]


def _to_checkpointing(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool) or (isinstance(value, int) and value >= 1):
        return value
    raise ValueError("must be auto, true, false or a number of layers from 1 on")


class Section(BaseModel):
    """Base of all parts of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ModelSection(Section):
    """The frozen models and what joins them."""

    language: str = Field(description="catalog name, folder (Hugging Face's or Meta's), .gguf file or hub id")
    vision: str | None = Field(
        None, description="catalog name, folder, file of OpenAI's CLIP or hub id of the vision tower; null for text"
    )
    delta: str | None = Field(
        None, description="folder with a delta that is added to the language model's weights, such as Vicuna's"
    )
    delta_compat: Literal["none", "lavin"] = Field(
        "none", description="lavin: the delta's q and k rows go where LaVIN puts them, as its Vicuna adapters need"
    )
    cache: Literal["auto", True, False] = Field(
        "auto",
        description="keep the quantized language model on disk and read it from there; auto: keep it where its weights "
        "take more than 1 GB in 16 bits (smaller ones are quantized in seconds) and enough of the disk stays free",
    )
    connector: Literal["taps", "patches"] = Field(
        "taps", description="taps: LaVIN's class tokens through a neck; patches: LLaVA's patches through a projector"
    )
    tap_every: int = Field(4, ge=1, description="taps: one visual token after every so many blocks of the tower")
    neck: int = Field(128, ge=1, description="taps: hidden width of the visual neck")
    patch_layer: int = Field(-2, description="patches: which of the tower's hidden states; -1 is the last block's")


class DataSection(Section):
    """The records and how they become tokens."""

    train: PluginChoice | None = Field(
        description="record format and file, for example alpaca:data.json; null for a model that is not trained"
    )
    split: str = Field("train", description="split to train on, for formats that have splits")
    validation: PluginChoice | None = Field(None, description="records for the loss during training")
    validation_split: str = Field("validation", description="split to validate on, for formats that have splits")
    test: PluginChoice | None = Field(None, description="records to answer before and after training")
    test_split: str = Field("test", description="split to test on, for formats that have splits")
    template: str = Field("auto", description="auto, chat, plain, lavin, or the path of a .jinja file")
    system: str | None = Field(None, description="system message put before conversations that have none")
    max_length: int = Field(512, ge=8, description="tokens per row, visual tokens included")
    too_long: Literal["drop", "truncate", "error"] = Field("drop", description="what happens to longer rows")
    normalization: Literal["model", "imagenet"] = Field(
        "model", description="mean and deviation of the pixels; model: the tower's own, imagenet: LaVIN's"
    )
    resize: Literal["squash", "crop"] = Field("squash", description="squash: LaVIN's; crop: CLIP's own")
    cache_features: Literal["auto", True, False] = Field(
        "auto", description="keep what the vision tower makes of images on disk; auto: if no adapter changes the tower"
    )
    workers: int | None = Field(
        None, ge=0, description="threads that read images ahead; null: one for each core, from 2 to 8"
    )


class TrainSection(Section):
    """The optimization."""

    epochs: float = Field(1.0, gt=0, description="how often each row is seen; fractions are fine")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(1, ge=1, description="rows per micro-batch")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine or linear schedule")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup: float = Field(0.03, ge=0, description="below 1: share of all steps; otherwise steps")
    weight_decay: float = Field(0.0, ge=0, description="not applied to biases and vectors")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of AdamW's two averages")
    eps: float = Field(1e-8, gt=0, description="what AdamW adds to its denominator")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="compute type; auto: bf16 on CUDA devices and CPUs that multiply it, fp16 on other CUDA devices, "
        "fp32 on other CPUs",
    )
    checkpointing: Annotated[Literal["auto"] | bool | int, PlainValidator(_to_checkpointing)] = Field(
        "auto",
        description="recompute layers in the backward pass; a number: only so many of them, which is faster where "
        "memory allows; auto: on CUDA as many as memory demands, on a CPU none",
    )
    offload: Literal["auto", True, False] = Field(
        "auto", description="keep the inputs of recomputed layers in host memory; auto: on CUDA"
    )
    stream: Literal["none", "cpu", "disk"] = Field(
        "none", description="where the base's layers wait for their turn on the device; none: they stay on it"
    )
    resident_layers: int = Field(
        0, ge=0, description="decoder layers of a streamed base that stay on the device, which saves their way to it"
    )
    adapter_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of what is trained and of its gradients; bf16 halves both and rounds every step"
    )
    engine: Literal["auto", "eager", "graph", "layerwise"] = Field(
        "auto",
        description="graph: replay each micro-batch as a CUDA graph; layerwise: all micro-batches of a step go through "
        "a layer before the next; auto: layerwise with stream, graph where that works, else eager",
    )
    pack: Literal["auto", True, False] = Field(
        "auto",
        description="put the rows of a step together into full micro-batches; auto: where CUDA graphs are recorded, "
        "and on a CPU with accumulate",
    )
    pack_tokens: int | None = Field(
        None,
        ge=64,
        description="tokens of a packed micro-batch; null: room for batch_size of the longest rows, "
        "more where memory allows",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    seed: int = Field(0, description="of the adapter's start values, the order of the rows and dropout")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl and calls of logging plugins")
    eval_every: int | None = Field(None, ge=1, description="steps between validations; null: after each epoch")
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; null: after each epoch. A new best is always saved"
    )
    keep: int = Field(2, ge=1, description="checkpoints to keep besides the best")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without improvement")


class EvaluationSection(Section):
    """Answering test records before and after training."""

    name: PluginChoice = Field(default_factory=lambda: Choice("exact-match"), description="how answers are scored")
    before: bool = Field(True, description="also evaluate the untrained model")
    max_new_tokens: int = Field(16, ge=1, description="tokens of an answer, at most")
    batch_size: int = Field(32, ge=1, description="records answered at a time")


class Recipe(Section):
    """A complete, valid recipe."""

    name: str = Field("run", description="part of the run folder's name; by default the recipe file's")
    model: ModelSection = Field(description="the frozen models")
    quant: PluginChoice = Field(default_factory=lambda: Choice("none"), description="how the frozen base is stored")
    vision_quant: PluginChoice = Field(
        default_factory=lambda: Choice("none"), description="how the frozen vision tower's linear layers are stored"
    )
    embed_quant: PluginChoice = Field(
        default_factory=lambda: Choice("none"), description="how the frozen embedding and output head are stored"
    )
    adapter: PluginChoice | None = Field(
        default_factory=lambda: Choice("lora"), description="what is trained in the base; null for nothing"
    )
    optim: PluginChoice = Field(default_factory=lambda: Choice("adamw"), description="the optimizer and its state")
    data: DataSection = Field(description="the records")
    train: TrainSection = Field(default_factory=TrainSection, description="the optimization")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="the test")

    def dump(self) -> dict[str, Any]:
        """Return the recipe as plain values, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every default written out."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)

    def check(self, plugins: Plugins) -> None:
        """Check that there is something to train, that settings agree, and all that a plugin answers for.

        Nothing heavy is loaded.

        :raises RecipeError: all faults together.
        """
        choices: list[tuple[str, Any, Choice | None]] = [
            ("quant", plugins.quantizers, self.quant),
            ("vision_quant", plugins.quantizers, self.vision_quant),
            ("embed_quant", plugins.quantizers, self.embed_quant),
            ("adapter", plugins.adapters, self.adapter),
            ("optim", plugins.optimizers, self.optim),
            ("data.train", plugins.datasets, self.data.train),
            ("data.validation", plugins.datasets, self.data.validation),
            ("data.test", plugins.datasets, self.data.test),
            ("evaluation.name", plugins.evaluations, self.evaluation.name),
        ]
        faults: list[str] = []
        for place, registry, choice in choices:
            if choice is None:
                continue
            try:
                registry[choice.name].parse_options(choice.options)
            except OptionsError as error:
                faults += [f"{place}: {error.subject}: {fault}" for fault in error.faults]
            except LavintkError as error:
                faults.append(f"{place}: {error}")
        if self.data.train is None:
            faults.append("data.train: null is for a model that is not trained; name the records to train on")
        if self.adapter is None and self.model.vision is None:
            faults.append("adapter: null leaves a text model with nothing to train; name an adapter, for example lora")
        if self.train.engine == "graph" and self.train.stream != "none":
            faults.append(
                f"train.engine: 'graph' does not go with train.stream={self.train.stream}, whose layers take turns in "
                "the device's memory; use --engine auto, layerwise or eager, or --stream none"
            )
        if self.train.resident_layers and self.train.stream == "none":
            faults.append(
                f"train.resident_layers: {self.train.resident_layers} is for a base that is streamed, and with "
                "train.stream=none all layers stay on the device; use --stream cpu or disk, or leave it out"
            )
        if faults:
            raise RecipeError(f"recipe {self.name!r}", faults)


def shipped() -> dict[str, Path]:
    """Return the recipes that come with lavintk, by name."""
    folder = Path(str(files("lavintk") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(reference: str) -> dict[str, Any]:
    """Return the raw content of a shipped recipe or of a YAML file.

    :raises RecipeError: no such recipe, or not a YAML mapping.
    """
    path = shipped().get(reference, Path(reference))
    if not path.is_file():
        known = list(shipped())
        raise RecipeError(
            f"recipe {reference!r}",
            [f"neither a file nor a shipped recipe ({', '.join(known)}).{did_you_mean(reference, known)}"],
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise RecipeError(str(path), [f"a recipe is a mapping of keys, found {type(content).__name__}"])
    content.setdefault("name", path.stem)
    return cast("dict[str, Any]", content)


def make_recipe(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return a valid recipe from raw content, with ``overrides`` (dotted keys to values) laid over it.

    :raises RecipeError: unknown keys, wrong types, values out of range; all of them together.
    """
    merged = _copy(content)
    for key, value in (overrides or {}).items():
        _set(merged, key.split("."), value)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        subject = f"recipe {content.get('name', 'run')!r}"
        raise RecipeError(subject, [_fault(cast("Mapping[str, Any]", e)) for e in error.errors()]) from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read ``a.b=value``; the value is YAML, so ``null``, ``true``, numbers and lists work.

    :raises RecipeError: no ``=``, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}", ["expected key=value, for example train.lr=1e-3"])
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}", [f"the value is not valid YAML: {error}"]) from error
    if isinstance(parsed, str) and _EXPONENT.fullmatch(parsed):
        parsed = float(parsed)
    return key.strip(), parsed


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterable[str]:
    """Yield every dotted key of a recipe."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _fault(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"] if part != "function-before[_to_choice(), any]")
    if error["type"] == "extra_forbidden":
        known = list(known_keys())
        close = did_you_mean(place, known) or _same_leaf(place, known)
        return f"unknown key {place!r}.{close}"
    if error["type"] == "missing":
        return f"{place} is required"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"


def _same_leaf(place: str, known: Iterable[str]) -> str:
    """Suggest a key of another section: ``lr`` for ``train.lr``."""
    leaf = place.rpartition(".")[2]
    found = [key for key in known if key.rpartition(".")[2] == leaf]
    return f" Did you mean {found[0]!r}?" if found else ""


def _copy(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in content.items()}


def _set(target: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = target.get(key)
        if isinstance(inner, str):  # quant: nf4 and --set quant.double_quant=false
            choice = Choice.parse(inner)
            inner = target[key] = {"name": choice.name, **choice.options}
        if not isinstance(inner, dict):
            inner = target[key] = {}
        target = inner
    target[keys[-1]] = value
