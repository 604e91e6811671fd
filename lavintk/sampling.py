"""How the next token is drawn; the torch model and the exported one share it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lavintk.errors import OptionsError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    :param temperature: divides the logits; 0 takes the most likely token.
    :param top_p: a token is kept while the mass of the more likely ones is at most this, as in LaVIN; 1 keeps all.
    :param top_k: keep so many tokens, before top_p is applied; 0 keeps all.
    :param seed: of the draw.
    :raises OptionsError: values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.temperature < math.inf:
            faults.append(f"temperature must be at least 0, got {self.temperature}")
        if not 0 <= self.top_p <= 1:
            faults.append(f"top_p must lie between 0 and 1, got {self.top_p}")
        if self.top_k < 0:
            faults.append(f"top_k must be at least 0, got {self.top_k}")
        if faults:
            raise OptionsError("sampling", faults)
