"""Numbers that mark tokens and rows; here, so that whatever only builds prompts needs no torch."""

IGNORED = -100
"""Label of a token that is not trained."""
TEXT, IMAGE = 0, 1
"""Conditions of a row: without and with an image (rows of LaVIN's modality embedding)."""
