"""The tokenizer as GGUF metadata: copied from the base's GGUF file, or made from its tokenizer files.

Two kinds are known: byte-level BPE out of ``tokenizer.json`` (GGUF's ``gpt2``), where the expression that cuts text
must be one that llama.cpp has a name for; and SentencePiece's BPE out of ``tokenizer.model`` (GGUF's ``llama``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.data.exported import exported_tokenizer
from lavintk.errors import ModelError
from lavintk.models.tokenizer import SENTENCEPIECE, TEXT_SPLITS, WHOLE_WORDS_FIRST

if TYPE_CHECKING:
    from lavintk.models.build import Assembly

CHAT_TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's kinds of tokens."""
INSTEAD = "Export with --format hf or onnx instead."


@dataclass
class _Vocabulary:
    """Tokens by id: text, kind, and a score for SentencePiece."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float]

    @classmethod
    def of_size(cls, size: int) -> _Vocabulary:
        """Return a vocabulary of ids that nothing uses, one for each row of the embedding."""
        return cls([f"[PAD{id}]" for id in range(size)], [UNUSED] * size, [-1000.0] * size)

    def put(self, id: int, token: str, kind: int, score: float = 0.0) -> None:
        self.tokens[id], self.kinds[id], self.scores[id] = token, kind, score


def add_tokenizer(writer: Any, assembly: Assembly, base: Path) -> None:
    """Write the tokenizer and the chat template.

    :param base: folder or ``.gguf`` file of the base model.
    :raises ModelError: llama.cpp has no such tokenizer.
    """
    if base.is_file():
        _copy(writer, base)
    else:
        content = json.loads(assembly.tokenizer.backend_tokenizer.to_str())
        vocabulary = _Vocabulary.of_size(int(assembly.model.language.config.vocab_size))
        if content["model"]["type"] != "BPE":
            raise ModelError(f"the tokenizer is a {content['model']['type']}, which the gguf exporter lacks. {INSTEAD}")
        if _is_byte_level(content):
            _add_byte_level(writer, content, vocabulary)
        else:
            _add_sentencepiece(writer, assembly, base, vocabulary)
        _add_special(writer, assembly)
    writer.add_chat_template(str(exported_tokenizer(assembly).chat_template))


def _copy(writer: Any, base: Path) -> None:
    """Copy all that a GGUF file says about its tokenizer, but the chat template."""
    from gguf import GGUFReader

    reader = GGUFReader(base)
    for field in reader.fields.values():
        if not field.name.startswith("tokenizer.") or field.name.startswith(CHAT_TEMPLATE):
            continue
        value = field.contents()
        if len(field.types) > 1 and not value:
            continue  # an array without items has no type to be written with
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)


def _is_byte_level(content: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(content.get("pre_tokenizer"), "pretokenizers"))


def _add_byte_level(writer: Any, content: dict[str, Any], vocabulary: _Vocabulary) -> None:
    model = content["model"]
    name = _splitting(content)
    for token, id in model["vocab"].items():
        vocabulary.put(id, token, NORMAL)
    for added in content["added_tokens"]:
        vocabulary.put(added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(merges)


def _splitting(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for how text is cut before byte pairs are merged.

    :raises ModelError: it has none, so that tokens would silently differ.
    """
    normalizers = _parts(content.get("normalizer"), "normalizers")
    if any(part["type"] != "NFC" for part in normalizers):  # llama.cpp normalizes nothing; most text is NFC already
        kinds = ", ".join(part["type"] for part in normalizers)
        raise ModelError(f"the tokenizer changes text in a way that llama.cpp lacks ({kinds}). {INSTEAD}")
    parts = _parts(content["pre_tokenizer"], "pretokenizers")
    expressions = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part["individual_digits"] for part in parts)
    own = any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts)
    whole_words = bool(content["model"].get("ignore_merges"))
    plain = {part["type"] for part in parts} <= {"Split", "Digits", "ByteLevel"}
    prefix = any(part.get("add_prefix_space") for part in parts)
    if plain and not prefix and not expressions and own and not whole_words:
        return "smollm" if digits else "gpt-2"
    if plain and not prefix and len(expressions) == 1 and not own and not digits:
        for name, expression in TEXT_SPLITS.items():
            if expression == expressions[0] and (name in WHOLE_WORDS_FIRST) == whole_words:
                return name
    raise ModelError(
        f"the tokenizer cuts text in a way that llama.cpp has no name for, or none that lavintk knows ("
        f"{', '.join(sorted(TEXT_SPLITS))}). {INSTEAD}"
    )


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps that a normalizer or pre-tokenizer of ``tokenizer.json`` consists of."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _add_sentencepiece(writer: Any, assembly: Assembly, base: Path, vocabulary: _Vocabulary) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(
            "the tokenizer is SentencePiece's, and writing it takes the package: pip install sentencepiece"
        ) from error
    place = next((path for path in (base, base.absolute().parent) if (path / SENTENCEPIECE).is_file()), None)
    if place is None:
        raise ModelError(
            f"the tokenizer is SentencePiece's, whose scores are only in its {SENTENCEPIECE}, and {base} has none: "
            f"copy it there from where the base comes from. {INSTEAD}"
        )
    original = SentencePieceProcessor(model_file=str(place / SENTENCEPIECE))
    for id in range(original.get_piece_size()):
        vocabulary.put(id, original.id_to_piece(id), _kind(original, id), original.get_score(id))
    for id, added in assembly.tokenizer.added_tokens_decoder.items():
        if id >= original.get_piece_size():
            vocabulary.put(id, str(added), CONTROL if added.special else USER_DEFINED)
    first = assembly.tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.kinds)
    writer.add_add_space_prefix(first.startswith("▁"))


def _kind(original: Any, id: int) -> int:
    if original.is_unknown(id):
        return UNKNOWN
    if original.is_control(id):
        return CONTROL
    if original.is_byte(id):
        return BYTE
    return UNUSED if original.is_unused(id) else NORMAL


def _add_special(writer: Any, assembly: Assembly) -> None:
    tokenizer = assembly.tokenizer
    roles = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for role, id in roles.items():
        if id is not None:
            getattr(writer, f"add_{role}_token_id")(int(id))
    others = [id for id in assembly.template.stop_ids if id != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(assembly.template.encoder.bos is not None)
