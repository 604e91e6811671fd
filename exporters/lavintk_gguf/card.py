"""``README.md`` of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lavintk import __version__
from lavintk.data.exported import exported_tokenizer, renders_as_trained
from lavintk.merge import ALL
from lavintk.model_card import front_matter, made_from, origin, with_provenance

if TYPE_CHECKING:
    from lavintk.models.build import Assembly
    from lavintk.run import Run
    from lavintk_gguf.architecture import Architecture


def write_card(out: Path, file: Path, run: Run, assembly: Assembly, condition: str, architecture: Architecture) -> None:
    """Write what ``file`` holds, what it was made from and how it is used."""
    recipe = run.recipe
    known = with_provenance({"base": assembly.base}, run)["base"]
    lines = [*front_matter("gguf", known, sees=False), f"# {recipe.name}", ""]
    lines += [f"Exported by lavintk {__version__} from {origin(run)}.", "", "## What it holds", ""]
    for line in _contents(file, run, condition, architecture):
        lines += [line, ""]
    lines += ["## Made from", "", *made_from(run, assembly.base), ""]
    lines += ["The licence of the base holds for this file too.", "", "## Use", ""]
    lines += ["```", f"llama-cli -m {file.name} --jinja", "```", ""]
    if recipe.data.system:
        lines += [
            f"It was trained with the system message {recipe.data.system!r}: the chat template in the file brings it.",
            "",
        ]
    if assembly.model.manner.decode_shift:
        lines += [
            "The run imitates LaVIN's generator, whose positions are off by one while it answers. llama.cpp counts "
            "them right, so answers may differ from the run's.",
            "",
        ]
    if not renders_as_trained(assembly, exported_tokenizer(assembly)):
        lines += [
            "The chat template gives the text of the prompts it was trained on, but not the same tokens: in training "
            "the parts of a prompt were tokenized one by one.",
            "",
        ]
    (out / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _contents(file: Path, run: Run, condition: str, architecture: Architecture) -> list[str]:
    recipe, config = run.recipe, architecture.config
    folded = "" if recipe.adapter is None else ", with the adapter folded in"
    lines = [f"`{file.name}`: a {architecture.name} for llama.cpp{folded}."]
    if recipe.quant.name != "none":
        lines.append(
            f"The adapter was trained on the base rounded to {recipe.quant.name}. The weights are those, in the type "
            "of this file, not the original ones."
        )
    if condition != ALL:
        fits, other = ("an image", "text") if condition == "image" else ("text alone", "image")
        lines.append(
            f"**Modality: {condition}.** The adapter has other weights for each modality and one merged model holds "
            f"one of them: this one is for prompts with {fits}. For the other export again with condition={other}."
        )
    if recipe.model.vision is not None:
        lines.append("**The vision tower is not in it**: it answers text.")
    if architecture.context < config.max_position_embeddings:
        lines.append(
            f"Its context is {architecture.context} tokens: behind them the model's sliding window begins, which "
            "llama.cpp leaves out for this architecture."
        )
    return lines
