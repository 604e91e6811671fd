"""``README.md`` of an exported folder: what it holds, what it was made from, how it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lavintk import __version__
from lavintk.merge import ALL
from lavintk.model_card import front_matter, made_from, origin, with_provenance

if TYPE_CHECKING:
    from lavintk.models.build import Assembly
    from lavintk.run import Run

Kind = Literal["text", "taps", "llava", "peft"]


@dataclass(frozen=True)
class Card:
    """What the page says of the folder.

    :param condition: of the adapter, folded in.
    :param dtype: type of the weights.
    :param exact_prompt: whether the chat template gives the tokens that were trained on.
    """

    kind: Kind
    condition: str
    dtype: str
    exact_prompt: bool = True


_USE = {
    "text": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "What colour is the sky?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]))""",
    "llava": """from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
parts = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": parts}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]))""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("the base named above")
model = PeftModel.from_pretrained(base, folder)""",
}
_USE["taps"] = _USE["text"]


def write_card(out: Path, run: Run, assembly: Assembly | None, card: Card) -> None:
    """Write ``README.md`` into ``out``.

    :param assembly: the loaded run, where it was loaded.
    """
    name = run.recipe.name
    base = assembly.base if assembly is not None else run.manifest.get("base", {})
    library = "peft" if card.kind == "peft" else "transformers"
    head = front_matter(library, with_provenance({"base": base}, run)["base"], sees=card.kind == "llava")
    lines = [*head, f"# {name}", "", f"Exported by lavintk {__version__} from {origin(run)}.", ""]
    lines += ["## What it holds", "", *_contents(run, card), "", "## Made from", ""]
    lines += [*made_from(run, base), ""]
    lines += ["The licence of the base holds for this folder too.", "", "## Use", ""]
    lines += ["```python", _USE[card.kind].replace("(folder", '("this folder"').replace(", folder", ', "this folder"')]
    lines += ["```", "", *_prompt(run, assembly, card)]
    (out / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _contents(run: Run, card: Card) -> list[str]:
    if card.kind == "peft":
        return _peft_contents(run)
    folded = "" if run.recipe.adapter is None else ", with the adapter folded in"
    lines = [f"The weights are {card.dtype}{folded}."]
    if run.recipe.quant.name != "none":
        lines.append(
            f"They are those of the base as it was trained on, rounded to {run.recipe.quant.name} and back, not the "
            "original ones: the adapter was trained to go with them."
        )
    if card.condition != ALL:
        other = "text alone" if card.condition == "image" else "images"
        lines.append(
            f"**Modality: {card.condition}.** The adapter has other weights for each modality and one merged model "
            f"holds one of them: this one is for prompts with {_modality(card.condition)}. For {other} export "
            f"again with condition={'text' if card.condition == 'image' else 'image'}, or to a format that holds both."
        )
    lines += _vision_contents(run, card)
    return _as_paragraphs(lines)


def _vision_contents(run: Run, card: Card) -> list[str]:
    if run.recipe.model.vision is None:
        return []
    if card.kind == "llava":
        return ["Vision tower, projector and language model are one LLaVA, which transformers loads as such."]
    if card.kind == "taps":
        return [
            "Images go in by LaVIN's way, for which transformers has no architecture. So what it loads from here is "
            "the **text model**. Beside it lie `vision/`, the vision tower with its adapters folded in, and "
            "`connector.safetensors`, the neck `up(silu(down(v)))` over its class tokens behind every "
            f"{run.recipe.model.tap_every} blocks, fp32: code of your own can join them; in image prompts the neck's "
            "outputs stand in place of token embeddings, and the image modality's weights are used."
        ]
    return ["**The vision tower is not in it**: it answers text."]


def _peft_contents(run: Run) -> list[str]:
    lines = ["The adapter alone, fp32, as PEFT stores LoRA. It belongs to the base named below and to no other."]
    if run.recipe.quant.name != "none":
        lines.append(
            f"It was trained on the base rounded to {run.recipe.quant.name}: load the base in the same way, or what "
            "it says differs from the trained model."
        )
    if run.recipe.model.vision is not None:
        lines.append("**Vision tower and connector are not in it**: it answers text.")
    return _as_paragraphs(lines)


def _prompt(run: Run, assembly: Assembly | None, card: Card) -> list[str]:
    lines = []
    if run.recipe.data.system:
        brings = "PEFT's folder has no template, so bring it" if card.kind == "peft" else "the chat template brings it"
        lines.append(f"It was trained with the system message {run.recipe.data.system!r}: {brings}.")
    if not card.exact_prompt:
        lines.append(
            "The chat template gives the text of the prompts it was trained on, but not the same tokens: in training "
            "the parts of a prompt were tokenized one by one. Tokenize `Image: N/A` and what follows it separately."
        )
    if assembly is not None and assembly.model.manner.decode_shift:
        lines.append(
            "The run imitates LaVIN's generator, whose positions are off by one while it answers. This folder counts "
            "them right, so answers may differ from the run's."
        )
    return ["## Prompt", "", *_as_paragraphs(lines)] if lines else []


def _modality(condition: str) -> str:
    return "an image" if condition == "image" else "text alone"


def _as_paragraphs(lines: list[str]) -> list[str]:
    return [part for line in lines for part in (line, "")][:-1]
