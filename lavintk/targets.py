"""Which linear layers an adapter's ``targets`` mean, and how PEFT would say it."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from lavintk.errors import ModelError, did_you_mean

LANGUAGE, VISION = "language.", "vision."
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What ``all`` stands for: the linear layers of a Llama-like decoder layer."""
HELP = (
    "layers to change, separated by commas (by + on the command line): all (the q, k, v, o, gate, up and down "
    "projections of the language model), leaf names such as q_proj, or patterns on whole names such as "
    "language.*.layers.1?.*; the vision tower only by a pattern like vision.*"
)
"""How an option ``targets`` is described."""


def select_linears(targets: str, linears: Collection[str], adapter: str) -> list[str]:
    """Return the members of ``linears`` that ``targets`` selects, in the order of ``linears``.

    :param targets: ``all``, leaf names and patterns, separated by ``,`` or ``+`` (see :data:`HELP`).
    :param linears: qualified names.
    :param adapter: how the error calls the adapter whose option it is.
    :raises ModelError: targets that select nothing, all of them listed.
    """
    selected: set[str] = set()
    faults = []
    for target in _split(targets):
        fitting = [name for name in linears if _fits(target, name)]
        selected.update(fitting)
        if not fitting:
            faults.append(f"{target!r} fits no linear layer.{_hint(target, linears)}")
    if faults or not selected:
        raise ModelError(_message(adapter, targets, faults or ["it is empty"], linears))
    return [name for name in linears if name in selected]


def peft_targets(selected: Collection[str], linears: Collection[str]) -> list[str]:
    """Return ``target_modules`` of ``adapter_config.json``: exactly the selected language layers.

    Leaf names where every layer of such a name is selected, as other tools know those best; else whole names.
    """
    leaves = {_leaf(name) for name in selected if name.startswith(LANGUAGE)}
    meant = {name for name in linears if name.startswith(LANGUAGE) and _leaf(name) in leaves}
    if meant <= set(selected):
        return sorted(leaves)
    return [name.removeprefix(LANGUAGE) for name in selected if name.startswith(LANGUAGE)]


def _split(targets: str) -> list[str]:
    parts = [part.strip() for part in re.split(r"[,+]", targets)]
    return [leaf for part in parts if part for leaf in (ALL if part == "all" else (part,))]


def _fits(target: str, name: str) -> bool:
    if not _is_pattern(target):
        return name.startswith(LANGUAGE) and _leaf(name) == target
    # a loose pattern such as *.q_proj must not adapt the vision tower by accident
    return fnmatchcase(name, target) and (name.startswith(LANGUAGE) or target.startswith(VISION))


def _is_pattern(target: str) -> bool:
    return any(character in target for character in ".*?[")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaves(linears: Collection[str], prefix: str) -> list[str]:
    return sorted({_leaf(name) for name in linears if name.startswith(prefix)})


def _hint(target: str, linears: Collection[str]) -> str:
    if target in _leaves(linears, VISION):
        return f" The vision tower has such layers: write {f'vision.*.{target}'!r}"
    return did_you_mean(target, linears if _is_pattern(target) else _leaves(linears, LANGUAGE))


def _message(adapter: str, targets: str, faults: list[str], linears: Collection[str]) -> str:
    example, leaves = next(iter(linears), ""), ", ".join(_leaves(linears, LANGUAGE)) or "none"
    return "\n".join(
        [
            f"targets={targets!r} of adapter {adapter!r} does not fit the model:",
            *(f"  - {fault}" for fault in faults),
            f"Known leaf names: {leaves}; 'all' means {', '.join(ALL)}.",
            f"Patterns are compared with whole names such as {example!r}.",
        ]
    )
