"""What templates and rows ask of a tokenizer; transformers' fast ones have it, those of exported folders too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class TextTokenizer(Protocol):
    """A tokenizer backed by ``tokenizers``, with the attributes of transformers' that lavintk uses."""

    @property
    def chat_template(self) -> Any:
        """The text of its Jinja template, or None."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a sequence."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that starts a sequence."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens, special ones among them, by id; ``str`` of one is its text."""
        ...

    @property
    def backend_tokenizer(self) -> Any:
        """The :class:`tokenizers.Tokenizer`."""
        ...

    # The parameters of these differ between versions of transformers in what does not matter here.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``{"input_ids": [...]}`` of a text; ``add_special_tokens=False`` adds no BOS."""
        ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Return a list of role and content as ``chat_template`` (its own by default) renders it.

        Called with ``tokenize=False`` and ``add_generation_prompt``.
        """
        ...

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Return the text of ids; ``skip_special_tokens`` leaves those out."""
        ...
