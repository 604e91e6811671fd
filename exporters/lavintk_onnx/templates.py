"""The texts of chat templates, which the clients of an exported folder read; see :mod:`lavintk.data.jinja`."""

from lavintk.data.jinja import exported_template, text_prompt_is_exact, without_block_lines

__all__ = ["exported_template", "text_prompt_is_exact", "without_block_lines"]
