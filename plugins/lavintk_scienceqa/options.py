"""The options of the evaluation ``scienceqa``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ScienceQaScoring:
    """How an answer is obtained and read, and how sure its share is."""

    scoring: Literal["generate", "likelihood"] = field(
        default="generate", metadata={"help": "generate: read the written answer; likelihood: the most likely choice"}
    )
    compat: Literal["none", "lavin"] = field(
        default="none",
        metadata={"help": "lavin: look through prompt and answer, and guess where nothing is found, as the original"},
    )
    seed: int = field(default=0, metadata={"help": "of the guesses and of the bootstrap"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap samples behind the 95 % intervals"})

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.scoring == "likelihood" and self.compat == "lavin":
            raise ValueError("compat=lavin is about written answers; it does not go with scoring=likelihood")
