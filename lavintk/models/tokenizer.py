"""Loads tokenizers from Hugging Face folders, GGUF files and SentencePiece's ``tokenizer.model``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lavintk.cache import cache_folder
from lavintk.errors import ModelError
from lavintk.models.gguf_source import GGUFHeader, read_header
from lavintk.models.meta_source import is_meta_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONVERSION = "1"
"""Version of the conversion below: a higher one leaves older cached tokenizers aside."""

SENTENCEPIECE = "tokenizer.model"
PROBES = ("Image: ", "Image: N/A", " two  spaces", "Response:The answer is A.\n", "42 naïve 漢字")
"""Texts that a converted tokenizer must cut as SentencePiece does."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")

# How text is cut before byte pairs are merged, by ``tokenizer.ggml.pre``: the expressions stand in the
# tokenizer.json of the models named.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT_SPLITS: dict[str, str | None] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,  # SmolLM3
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,  # Mistral
    "smollm": None,
    "gpt-2": None,
}
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""Vocabularies in which a whole word that is a token is taken before any merge, and text starts with BOS."""

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder or ``.gguf`` file; it has a padding id and gives offsets.

    The conversion from GGUF and from SentencePiece takes seconds, so its result is kept in the cache directory, keyed
    by what it was made from. A folder of Meta's may have its ``tokenizer.model`` one folder up, where Meta puts it.
    Where the model has no padding token, the end token stands in: the vocabulary never grows.

    :raises ModelError: no tokenizer is there, or none of the fast kind, or it needs code of its own.
    """
    path = Path(path)
    tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {path} ({type(tokenizer).__name__}) is a slow one, which cannot tell where a "
            "token lies in the text. lavintk needs a tokenizer.json beside the model."
        )
    _ensure_padding(tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Check that every id of the tokenizer has a row in the embedding.

    :raises ModelError: says the highest id and the number of rows.
    """
    rows = int(config.get_text_config().vocab_size)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if highest >= rows:
        raise ModelError(
            f"tokenizer and model do not belong together: the tokenizer goes up to id {highest} ({token!r}), "
            f"the embedding has {rows} rows (ids 0 to {rows - 1}). Use the tokenizer files that came with the weights."
        )


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ModelError(f"no tokenizer at {folder}: there is no such file or folder")
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if present == [SENTENCEPIECE]:
        return _from_sentencepiece(folder / SENTENCEPIECE)
    if not present and is_meta_folder(folder) and (folder.absolute().parent / SENTENCEPIECE).is_file():
        return _from_sentencepiece(folder.absolute().parent / SENTENCEPIECE)
    if not present:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(
            f"{folder} holds no tokenizer (no tokenizer.json). Found: {found}. "
            "Copy the tokenizer files that came with the weights beside them."
        )
    return _auto_tokenizer(folder)


def _auto_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # broken files surface as exceptions of many kinds
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}\n"
            "lavintk needs one that transformers knows, with a tokenizer.json, and runs no code of a model's."
        ) from error
    return tokenizer


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of LLaMA's ``tokenizer.model``.

    :raises ModelError: it cannot be converted, or the result would cut text in another way.
    """
    model = path.read_bytes()
    if not model.startswith(b"\n"):  # the first field of SentencePiece's message
        raise ModelError(
            f"{path} is no SentencePiece model; Llama 3's is of another kind. Copy the tokenizer.json of the same "
            "model's Hugging Face folder beside the weights."
        )
    cached = cache_folder() / "tokenizers" / _conversion_key(model)
    if (cached / "tokenizer.json").is_file():
        return _auto_tokenizer(cached)
    if find_spec("sentencepiece") is None:
        raise ModelError(
            f"{path} is a SentencePiece model, and converting it takes the package sentencepiece: pip install "
            "sentencepiece\nOr copy the tokenizer.json of the same model's Hugging Face folder beside the weights."
        )
    tokenizer = _converted_sentencepiece(path)
    _ensure_padding(tokenizer)
    try:
        _keep(tokenizer, cached)
    except OSError as error:
        log.warning("the converted tokenizer of %s cannot be kept for the next time: %s", path, error)
        return tokenizer
    return _auto_tokenizer(cached)


def _converted_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    with TemporaryDirectory(prefix="lavintk-") as alone:
        os.symlink(path.resolve(), Path(alone) / SENTENCEPIECE)
        try:
            original = SentencePieceProcessor(model_file=str(path))
            backend = LlamaTokenizer.from_pretrained(alone, local_files_only=True).backend_tokenizer
        except Exception as error:  # both say in many ways that a file is not theirs
            raise ModelError(f"{path} cannot be converted: {type(error).__name__}: {error}") from error
    # transformers adds no space to a text that starts with one; SentencePiece always does
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    different = [
        probe for probe in PROBES if backend.encode(probe, add_special_tokens=False).ids != original.encode(probe)
    ]
    if different or backend.get_vocab_size() != original.get_piece_size():
        raise ModelError(
            f"{path} cannot be converted faithfully: transformers cuts {different[:1] or 'other tokens'} differently. "
            "Copy the tokenizer.json of the same model's Hugging Face folder beside the weights."
        )
    roles = {"bos_token": original.bos_id(), "eos_token": original.eos_id(), "unk_token": original.unk_id()}
    special = {role: original.id_to_piece(id) for role, id in roles.items() if id >= 0}
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(tokenizer_object=backend, add_bos_token=True, **special)
    return tokenizer


def _conversion_key(content: bytes) -> str:
    """Return a hash of what a conversion rests on: ``content``, which holds the tokenizer, and the code."""
    from transformers import __version__

    digest = hashlib.sha256(f"{CONVERSION} {__version__}\n".encode())
    digest.update(content)
    return digest.hexdigest()[:32]


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    header = read_header(path)
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise ModelError(f"{path} holds no tokenizer; name the model's Hugging Face folder instead")
    cached = cache_folder() / "tokenizers" / _cache_key(path, header)
    if (cached / "tokenizer.json").is_file():
        return _auto_tokenizer(cached)
    tokenizer = _trimmed(_converted(path), int(header.metadata["tokenizer.ggml.tokens"]))
    _set_splitting(tokenizer, header, path)
    _ensure_padding(tokenizer)
    try:
        _keep(tokenizer, cached)
    except OSError as error:
        log.warning("the converted tokenizer of %s cannot be kept for the next time: %s", path, error)
        return tokenizer
    return _auto_tokenizer(cached)  # what every later run will see


def _converted(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory(prefix="lavintk-") as alone:  # beside other files, a tokenizer.json would win
        os.symlink(path.resolve(), Path(alone) / path.name)
        try:
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                alone, gguf_file=path.name, local_files_only=True
            )
        except Exception as error:  # transformers knows some kinds of tokenizer, and says so in many ways
            raise ModelError(
                f"the tokenizer in {path} cannot be converted: {type(error).__name__}: {error}\n"
                "Use the model's Hugging Face folder instead."
            ) from error
    return tokenizer


def _trimmed(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer without tokens from id ``size`` on: transformers' classes may add their own."""
    if len(tokenizer) <= size:
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    backend = Tokenizer.from_str(json.dumps(content))
    special = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and backend.token_to_id(token) is not None
    }
    make: Any = PreTrainedTokenizerFast
    trimmed: PreTrainedTokenizerBase = make(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        add_bos_token=tokenizer.add_bos_token,
        add_eos_token=tokenizer.add_eos_token,
        **special,
    )
    return trimmed


def _cache_key(path: Path, header: GGUFHeader) -> str:
    with path.open("rb") as file:
        return _conversion_key(file.read(header.length))


def _keep(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="incomplete-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        tokenizer.save_pretrained(made)
        if not folder.exists():  # else another process was quicker, with the same result
            os.rename(made, folder)


def _set_splitting(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader, path: Path) -> None:
    """Cut text as the model was trained to; transformers leaves GPT-2's way where it does not know the name.

    :raises ModelError: the name is missing or unknown, so that tokens would silently differ.
    """
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return  # sentencepiece vocabularies do not cut
    from tokenizers import Regex, pre_tokenizers

    name = header.metadata.get("tokenizer.ggml.pre")
    if name not in TEXT_SPLITS:
        raise ModelError(
            f"{path} cuts text in a way named {name!r} (tokenizer.ggml.pre), which lavintk does not know; "
            f"known: {', '.join(sorted(TEXT_SPLITS))}. Use the model's Hugging Face folder instead."
        )
    expression = TEXT_SPLITS[name]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    parts: list[Any] = [byte_level]
    if expression is not None:
        parts.insert(0, pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    elif name == "smollm":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.model.ignore_merges = name in WHOLE_WORDS_FIRST
    if name in WHOLE_WORDS_FIRST and "tokenizer.ggml.add_bos_token" not in header.metadata:
        tokenizer.add_bos_token = True


def _ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding id out of its vocabulary."""
    if tokenizer.pad_token_id is not None:
        return
    for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
        if token is not None:
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
