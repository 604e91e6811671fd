"""The methods of PEFT that work on frozen linear layers; imports neither PEFT nor torch.

A method stands here if it changes linear layers only, changes no output at the start, reads the base's weight without
changing it, and needs no call between the steps. Those are tested with the conformance kit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method of PEFT.

    :param config: name of PEFT's configuration class.
    :param settings: fields of it that a user may set.
    :param ranked: whether its field ``r`` is a rank.
    :param fixed: fields that make it this method, or make it change nothing at the start.
    """

    config: str
    settings: tuple[str, ...]
    ranked: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)


_LORA = ("lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern")
_FREQUENCIES = ("n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern")
_OFT = ("oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")

METHODS: Mapping[str, Method] = {
    "boft": Method("BOFTConfig", ("boft_block_size", "boft_block_num"), ranked=False),
    "c3a": Method("C3AConfig", ("block_size", "block_size_pattern"), ranked=False, fixed={"init_weights": True}),
    "delora": Method("DeloraConfig", ("delora_lambda", "rank_pattern", "lambda_pattern")),
    "dora": Method("LoraConfig", _LORA, fixed={"use_dora": True}),
    "fourierft": Method("FourierFTConfig", _FREQUENCIES, ranked=False, fixed={"init_weights": True}),
    "gralora": Method("GraloraConfig", ("alpha", "gralora_dropout", "gralora_k", "hybrid_r")),
    "hira": Method("HiraConfig", ("hira_dropout", "rank_pattern")),
    "hra": Method("HRAConfig", ("apply_GS",)),
    "ia3": Method("IA3Config", ("feedforward_modules",), ranked=False),
    "loha": Method("LoHaConfig", ("alpha", "rank_dropout", "rank_pattern", "alpha_pattern")),
    "lokr": Method(
        "LoKrConfig",
        (
            *("alpha", "rank_dropout", "rank_dropout_scale", "rank_pattern", "alpha_pattern"),
            *("decompose_both", "decompose_factor"),
        ),
    ),
    "lora": Method("LoraConfig", _LORA),
    "miss": Method("MissConfig", ("miss_dropout",)),
    "oft": Method("OFTConfig", _OFT, ranked=False),
    "randlora": Method(
        "RandLoraConfig",
        ("randlora_alpha", "randlora_dropout", "sparse", "very_sparse", "projection_prng_key"),
        # PEFT would save the common projection once for each layer; the key gives it again
        fixed={"save_projection": False},
    ),
    "road": Method("RoadConfig", ("variant", "group_size"), ranked=False),
    "rslora": Method("LoraConfig", _LORA, fixed={"use_rslora": True}),
    "vera": Method("VeraConfig", ("vera_dropout", "d_initial", "projection_prng_key", "save_projection")),
    "waveft": Method("WaveFTConfig", (*_FREQUENCIES, "wavelet_family", "use_idwt", "proportional_parameters"), False),
}
"""By the name that the option ``method`` takes."""

PLAIN_STARTS = (True, "gaussian", "orthogonal")
"""``init_lora_weights`` that change nothing at the start and leave the base's weight alone."""
