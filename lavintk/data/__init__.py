"""Data: formats, templates, tokens, batches."""
