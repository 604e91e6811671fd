r"""Chat templates for other programs: what lavintk puts around a conversation, as Jinja text.

A client that knows nothing of lavintk renders the template of the exported folder and cuts the text into tokens as a
whole. What comes out are the ids that the model was trained on: the system message of the recipe, one image placeholder
for each image with the line break behind it, and the one BOS. Three engines read the text: Jinja (transformers),
``@huggingface/jinja`` (transformers.js) and minja (onnxruntime-genai, llama.cpp), so it keeps to what all three know.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.data.layout import Encoder, TextPiece
from lavintk.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_SUFFIX = "\n"
"""What :func:`lavintk.data.template.make_template` puts behind an image unless asked otherwise."""

# A part of a message is {"type": "text", "text": ...} or {"type": "image", ...}. Behind an image comes the suffix
# unless the text has it or nothing follows, as in lavintk.data.layout. The namespace's name keeps our variables apart
# from those of the model's own template.
_FLATTEN = """\
{%- set lavintk = namespace(messages=[], text='', image=false, images=0) -%}
{%- for message in messages -%}
  @SYSTEM@
  {%- if message['content'] is string -%}
    {%- set lavintk.messages = lavintk.messages + [message] -%}
  {%- else -%}
    {%- set lavintk.text = '' -%}
    {%- set lavintk.image = false -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        @TEXT@
        {%- if part['text'] -%}{%- set lavintk.image = false -%}{%- endif -%}
      {%- else -%}
        @IMAGE@
      {%- endif -%}
    {%- endfor -%}
    {%- set lavintk.messages = lavintk.messages + [{'role': message['role'], 'content': lavintk.text}] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = lavintk.messages -%}
"""
_SYSTEM = """\
{%- if loop.first and message['role'] != 'system' -%}
    {%- set lavintk.messages = [{'role': 'system', 'content': @SYSTEM@}] -%}
  {%- endif -%}"""
_PLAIN_TEXT = "{%- set lavintk.text = lavintk.text + part['text'] -%}"
_TEXT_AFTER_IMAGE = """\
{%- if lavintk.image and part['text'] and not part['text'].startswith(@SUFFIX@) -%}
          {%- set lavintk.text = lavintk.text + @SUFFIX@ -%}
        {%- endif -%}
        {%- set lavintk.text = lavintk.text + part['text'] -%}"""
_IMAGE = """\
{%- if lavintk.image -%}{%- set lavintk.text = lavintk.text + @SUFFIX@ -%}{%- endif -%}
        {%- set lavintk.text = lavintk.text + @PLACEHOLDER@ -%}
        {%- set lavintk.image = true -%}"""
_NO_IMAGE = "{{- raise_exception('this model takes no images, only parts of the type text') -}}"
_TEXT_WITHOUT_BREAK = """\
{%- if lavintk.image and part['text'].startswith(@SUFFIX@) -%}
          {%- set lavintk.text = lavintk.text + part['text'][1:] -%}
        {%- else -%}
          {%- set lavintk.text = lavintk.text + part['text'] -%}
        {%- endif -%}"""
_IMAGE_AHEAD = """\
{%- set lavintk.images = lavintk.images + 1 -%}
        {%- set lavintk.image = true -%}"""
_BOS = "{{- @BOS@ -}}\n"
_TURNS = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] + '\\n' -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'Instruction: ' + message['content'] + '\\nResponse:' -}}
  {%- else -%}
    {{- message['content'] + @EOS@ -}}
  {%- endif -%}
{%- endfor -%}
"""
_LAVIN_WITHOUT_IMAGE = "{{- @ABSENT@ -}}\n"
_LAVIN_HEAD = """\
{%- if lavintk.images == 0 -%}
  {{- @ABSENT@ -}}
{%- endif -%}
{%- for image in range(lavintk.images) -%}
  {{- 'Image: ' + @PLACEHOLDER@ -}}
{%- endfor -%}
"""


def exported_template(
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    system: str | None = None,
    placeholder: str | None = None,
    *,
    parts: bool = True,
) -> str:
    """Return the Jinja text that gives other programs the prompts of lavintk's own template.

    :param kind: as :attr:`lavintk.data.template.Template.kind`: ``chat``, ``plain``, ``lavin`` or a Jinja file.
    :param system: the system message of conversations that bring none.
    :param placeholder: text of the token that stands for one visual token, or for an image whose tokens the program
        counts itself; None for a model without vision.
    :param parts: the content of a message may also be a list of parts, as processors give it. Without, and if there is
        nothing to add either, a chat template stays as the tokenizer has it.
    :raises ModelError: the tokenizer has no chat template, or no EOS token where the form needs one.
    """
    flatten = _flattening(kind == "lavin", system, placeholder) if parts or system or placeholder is not None else ""
    if kind in ("plain", "lavin"):
        body = _filled(_TURNS, EOS=_quoted(_eos(tokenizer)))
        if kind == "lavin":
            absent = _quoted("Image: N/A" + separator(tokenizer))
            head = _LAVIN_HEAD if flatten else _LAVIN_WITHOUT_IMAGE
            body = _filled(head, ABSENT=absent, PLACEHOLDER=_quoted(placeholder or "")) + body
    else:
        body = _own_template(tokenizer, kind)
        body = "{{- '' }}" + without_block_lines(body) if flatten else body
    bos = missing_bos(tokenizer, kind)
    return flatten + (_filled(_BOS, BOS=_quoted(bos)) if bos else "") + body


def _flattening(lavin: bool, system: str | None, placeholder: str | None) -> str:
    """Return what makes texts of messages that are lists of parts, and puts the system message in front."""
    filled = {"SUFFIX": _quoted(IMAGE_SUFFIX), "PLACEHOLDER": _quoted(placeholder or "")}
    text, image = _PLAIN_TEXT, _NO_IMAGE
    if placeholder is not None:
        text, image = (_TEXT_WITHOUT_BREAK, _IMAGE_AHEAD) if lavin else (_TEXT_AFTER_IMAGE, _IMAGE)
    ahead = _filled(_SYSTEM, SYSTEM=_quoted(system)) if system else ""
    return _filled(_FLATTEN, SYSTEM=ahead, TEXT=_filled(text, **filled), IMAGE=_filled(image, **filled))


def missing_bos(tokenizer: PreTrainedTokenizerBase, kind: str) -> str | None:
    """Return the BOS token if the tokenizer puts one in front by itself and the template's text lacks it."""
    if Encoder(tokenizer, 0).bos is None:
        return None
    bos = str(tokenizer.bos_token)
    if kind in ("plain", "lavin"):
        return bos
    rendered: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}],
        chat_template=_own_template(tokenizer, kind),
        tokenize=False,
        add_generation_prompt=True,
    )
    return None if str(rendered).startswith(bos) else bos


def separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what keeps two texts apart that lavintk cuts into tokens one by one, as LaVIN does.

    A space does for tokenizers of SentencePiece's kind, which put one in front of every text. Others have nothing that
    leaves no trace; for them the empty text comes back, and :func:`text_prompt_is_exact` says no.
    """
    return " " if _separates(tokenizer, " ") else ""


def text_prompt_is_exact(tokenizer: PreTrainedTokenizerBase, kind: str, system: str | None = None) -> bool:
    """Return whether other programs get the ids of lavintk for conversations without an image; with one they do.

    :param system: the system message of conversations that bring none.
    """
    return kind != "lavin" or _separates(tokenizer, separator(tokenizer), system)


def without_block_lines(template: str) -> str:
    """Return ``template`` without the white space that transformers drops around blocks.

    transformers and transformers.js drop the blanks in front of a block that starts a line and the line break behind a
    block (Jinja's ``lstrip_blocks`` and ``trim_blocks``); onnxruntime-genai drops neither. The result reads the same
    with both.
    """
    text = template.removesuffix("\n")  # Jinja drops the last line break, and would drop another one
    text += "{{ '' }}" if text.endswith("\n") else ""
    stripped = re.sub(r"^[ \t]*(\{[%#](?![-+]))", r"\1", text, flags=re.MULTILINE)
    # A second line break is text, and must not be taken for the one behind the block in turn.
    return re.sub(r"([%#]\})\n(\n?)", lambda found: found[1] + ("{{ '\\n' }}" if found[2] else ""), stripped)


def _own_template(tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    if kind != "chat":
        return Path(kind).expanduser().read_text(encoding="utf-8")
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("the tokenizer has no chat template, or several; name one by its .jinja file")
    return tokenizer.chat_template


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError("the tokenizer has no EOS token, which the Instruction/Response form ends answers with")
    return str(tokenizer.eos_token)


def _separates(tokenizer: PreTrainedTokenizerBase, between: str, system: str | None = None) -> bool:
    asked = "Instruction: a\nResponse:"
    encoder, texts = Encoder(tokenizer, 0), ("Image: N/A", f"{system}\n{asked}" if system else asked)
    apart = encoder.encode([TextPiece(text) for text in texts]).ids
    return apart == encoder.encode([TextPiece(between.join(texts))]).ids


def _quoted(text: str) -> str:
    """Return ``text`` as a string of Jinja's; all three engines know JSON's escapes of quotes and line breaks."""
    return json.dumps(text, ensure_ascii=False)


def _filled(template: str, **values: str) -> str:
    return re.sub(r"@([A-Z]+)@", lambda found: values.get(found[1], found[0]), template)
