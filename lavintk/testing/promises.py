"""How checks speak of promises: which one, whose, and what was found instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lavintk.testing.outcome import Report, not_asked

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Promise:
    """One sentence of a contract.

    :param member: whose it is, for example ``"Quantizer.quantize"``.
    :param text: what it promises, a sentence without its stop.
    """

    member: str
    text: str

    def require(self, condition: bool, found: str) -> None:
        """Raise an AssertionError with ``found`` unless ``condition`` holds."""
        if not condition:
            raise AssertionError(self.broken(found))

    def require_close(self, found: Tensor, expected: Tensor, limit: float, what: str) -> None:
        """Compare two tensors of one shape: root mean square of the difference, relative to that of ``expected``."""
        self.require(
            found.shape == expected.shape, f"{what} of shape {list(found.shape)} instead of {list(expected.shape)}"
        )
        error = relative_error(found, expected)
        self.require(error <= limit, f"{what} is off by {error:.2g} of its size, at most {limit:.2g} is allowed")

    def broken(self, found: str) -> str:
        """Return the sentence for a broken promise."""
        return f"{self.member} breaks its promise ({self.text}): {found}"


class Promises:
    """Gathers what was asked of one plugin."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._kept: dict[str, None] = {}
        self._skipped: dict[str, None] = {}

    @contextmanager
    def keep(self, member: str, text: str) -> Iterator[Promise]:
        """Ask for a promise; an exception of the plugin's own breaks it as well."""
        promise = Promise(member, text)
        try:
            yield promise
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(promise.broken(f"it raised {type(error).__name__}: {error}")) from error
        self._kept[f"{member}: {text}"] = None

    def skip(self, member: str, reason: str) -> None:
        """Note what cannot be asked here, and why."""
        self._skipped[f"{member}: {reason}"] = None

    def report(self) -> Report:
        """Return what was asked; pytest lists what was not."""
        for reason in self._skipped:
            not_asked().setdefault(reason, {})[self._subject] = None
        return Report(tuple(self._kept), tuple(self._skipped))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of ``expected``; infinite where something is not a number."""
    import torch

    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    size, difference = float(expected.norm()), float((found - expected).norm())
    error = difference / size if size else (difference and float("inf"))
    return error if torch.isfinite(found).all() else float("inf")


def class_name(product: object) -> str:
    """Return how a product of a plugin is called in a report."""
    return f"{type(product).__module__}.{type(product).__qualname__}"
