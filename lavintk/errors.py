"""Errors that speak to the person at the terminal: what was asked, what was found, what to do.

Everything derived from :class:`LavintkError` is expected and is shown without a traceback (``--debug`` shows it);
any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LavintkError(Exception):
    """Base of all errors a user can cause or cure. ``exit_code`` is what the command line returns."""

    exit_code = 1


class FaultsError(LavintkError):
    """Several faults found together, so that one run shows all that has to be mended.

    :param subject: the thing that is wrong, for example ``"train.yaml"``.
    :param faults: one sentence each, without a final stop.
    """

    shown = 20

    def __init__(self, subject: str, faults: Sequence[str], advice: str = "") -> None:
        self.subject, self.faults, self.advice = subject, tuple(faults), advice
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        listed = [f"  - {fault}" for fault in self.faults[: self.shown]]
        if len(self.faults) > self.shown:
            listed.append(f"  ... and {len(self.faults) - self.shown} more")
        super().__init__("\n".join([f"{subject} has {count}:", *listed, *([advice] if advice else [])]))


class PluginError(LavintkError):
    """A plugin cannot be loaded, clashes with another one, or failed in a hook."""


class UnknownNameError(LavintkError):
    """A name that no plugin offers; carries what is known."""

    def __init__(self, kind: str, name: str, known: Sequence[str], owners: Sequence[str] = ()) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        labels = [f"{n} ({o})" if o else n for n, o in zip(known, owners or [""] * len(known), strict=True)]
        listed = ", ".join(labels) if labels else "none (no plugin offers one)"
        super().__init__(f"no {kind} named {name!r}. Known: {listed}.{did_you_mean(name, known)}")


class OptionsError(FaultsError):
    """Options of a plugin's entry that do not fit what the entry declares."""


class RecipeError(FaultsError):
    """A recipe with unknown keys, wrong types or values out of range."""


class DataError(FaultsError):
    """Faults in a data file, each with file, line or record, and field."""


class CheckpointError(FaultsError):
    """Weights that are missing, unexpected, of another shape, or cannot be read."""


class ModelError(LavintkError):
    """A model or tokenizer that lavintk cannot use as asked."""


class NotAffineError(ModelError):
    """An adapter, as configured, cannot be written as a low-rank update and a bias."""


class DownloadError(LavintkError):
    """Something that should come from the network did not arrive intact."""


class RunError(LavintkError):
    """A run folder that is missing, incomplete or in the way."""


class TrainingError(LavintkError):
    """Training had to stop: the message says why and what is safe on disk."""


class OutOfMemoryError(TrainingError):
    """The device's memory did not suffice; the message says what to lower, with numbers."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
