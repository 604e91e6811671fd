"""The tokenizer of an exported folder, from ``tokenizer.json`` and ``tokenizer_config.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers hands to chat templates."""


class ExportedTokenizer:
    """A :class:`lavintk.data.tokenizer.TextTokenizer` without transformers.

    :param backend: from ``tokenizer.json``.
    :param config: ``tokenizer_config.json``.
    :param chat_template: text of the template, or None.
    """

    def __init__(self, backend: Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self.backend_tokenizer, self.chat_template = backend, chat_template
        self.special_tokens = {role: text for role in ROLES if (text := _content(config.get(role))) is not None}
        if config.get("clean_up_tokenization_spaces") and type(backend.model).__name__ != "BPE":
            raise ModelError(
                "tokenizer_config.json asks for clean_up_tokenization_spaces with a tokenizer that is not of the BPE "
                "kind; the runtime does not do that. Set it to false if decoded text looks right without."
            )
        if "add_bos_token" in config or "add_eos_token" in config:
            self._put_around(bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))

    @classmethod
    def from_folder(cls, folder: Path) -> ExportedTokenizer:
        """Read the tokenizer of a folder.

        :raises ModelError: a file is missing or cannot be read.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json. Export the run anew with `lavintk export`.")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ModelError(f"{path} cannot be read: {error}") from error
        config = _read_config(folder / "tokenizer_config.json")
        return cls(backend, config, _chat_template(folder, config))

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that starts a sequence."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a sequence."""
        return self._id("eos_token")

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by id, in order."""
        return dict(sorted(self.backend_tokenizer.get_added_tokens_decoder().items()))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return ``{"input_ids": [...]}``."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        chat_template: str | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any:
        """Return the text of a conversation, or its ids with ``tokenize``.

        :param chat_template: instead of the folder's own.
        :raises ValueError: there is no template.
        """
        from lavintk.runtime.chat_template import render

        template = chat_template or self.chat_template
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        text = render(template, conversation, add_generation_prompt, self.special_tokens)
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: Any = None
    ) -> str:
        """Return the text of ``ids``; nothing is cleaned up."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend_tokenizer.token_to_id(text)

    def _put_around(self, bos: bool, eos: bool) -> None:
        """Put BOS in front of and EOS behind a text, as the configuration says: it overrules tokenizer.json."""
        from tokenizers import processors

        start = self.special_tokens.get("bos_token") if bos else None
        end = self.special_tokens.get("eos_token") if eos else None
        places = [(start, self.bos_token_id), (end, self.eos_token_id)]
        self.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*([start] if start else []), "$A", *([end] if end else [])],
            special_tokens=[(text, number) for text, number in places if text and number is not None],
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing. Export the run anew with `lavintk export`.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the text of ``chat_template.jinja``, else what ``tokenizer_config.json`` holds."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    """Return the text of a special token, which may be written with its properties."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
