"""Tiny random models and tokenizers: those of the conformance kit."""

from lavintk.testing.tiny import *  # noqa: F403
