"""Helpers for tests of lavintk and of plugins."""
