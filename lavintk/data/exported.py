"""The tokenizer of a run for other programs: its chat template renders prompts as the run was trained on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.data.jinja import exported_template
from lavintk.data.records import IMAGE_MARKER, Message, Record
from lavintk.errors import LavintkError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lavintk.models.build import Assembly


def exported_tokenizer(assembly: Assembly, *, images: bool = False) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose chat template renders prompts as the run was trained on.

    :param images: the template also takes messages made of parts, as processors give them.
    """
    template = assembly.template
    tokenizer: Any = copy.deepcopy(assembly.tokenizer)
    tokenizer.chat_template = exported_template(
        tokenizer, template.kind, template.system, IMAGE_MARKER if images else None, parts=images
    )
    rows = assembly.model.language.config.max_position_embeddings
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), int(rows))
    result: PreTrainedTokenizerBase = tokenizer
    return result


def renders_as_trained(assembly: Assembly, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template gives the very tokens of a prompt without image that was trained on."""
    record = Record("probe", (Message("user", "What is this?"),))
    messages = [{"role": "user", "content": "What is this?"}]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    try:
        return list(encoded["input_ids"]) == assembly.template.prompt_ids(record)
    except LavintkError:
        return False


def write_generation_config(out: Path, assembly: Assembly, base: Path, suppressed: list[int] | None = None) -> None:
    """Write the base's ``generation_config.json`` with the ids that ended an answer in training.

    :param base: folder or file of the base model.
    :param suppressed: ids that must never be sampled.
    """
    file = base / "generation_config.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stops = list(assembly.template.stop_ids)
    content |= {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": assembly.tokenizer.pad_token_id}
    if assembly.tokenizer.bos_token_id is not None:
        content["bos_token_id"] = assembly.tokenizer.bos_token_id
    if suppressed:
        content["suppress_tokens"] = suppressed
    text = json.dumps(content, indent=2, sort_keys=True)
    (out / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make the marker of images a token of its own and return its id; the id may lie behind the embedding's rows."""
    added: Any = tokenizer
    added.add_tokens([IMAGE_MARKER], special_tokens=True)
    return int(added.convert_tokens_to_ids(IMAGE_MARKER))
