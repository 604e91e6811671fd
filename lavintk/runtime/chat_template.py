"""Renders chat templates as transformers does, without it: the same sandbox, filters and globals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(
    template: str, messages: Sequence[Mapping[str, str]], generate: bool, special_tokens: Mapping[str, str]
) -> str:
    """Return the conversation as ``template`` shows it.

    :param generate: with the start of the next answer.
    :param special_tokens: by role, for example ``bos_token``; templates may name them.
    :raises jinja2.TemplateError: the template is faulty or refuses the conversation.
    """
    shown = [dict(message) for message in messages]  # templates may not change the caller's
    return _compiled(template).render(
        messages=shown, tools=None, documents=None, add_generation_prompt=generate, **special_tokens
    )


@lru_cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


class GenerationBlocks(Extension):
    """``{% generation %}``: marks what the assistant says; here its content is just shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the content with a scope of its own, which transformers gives it too."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
