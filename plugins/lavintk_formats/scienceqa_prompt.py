"""Prompts and answers of ScienceQA under the names of its own repository, for example ``QCM-ALE``.

Letters: Q question, C context, M options, L lecture, E explanation (``solution``), A answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

OUTPUTS = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
PROMPT_FORMATS = (
    *(f"CQM-{output}" for output in OUTPUTS),
    *(f"QCM-{output}" for output in OUTPUTS),
    *(f"{given}-A" for given in ("QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")),
    "QCML-AE",
)
"""The names that are accepted."""
LETTERS = "ABCDE"
Compat = Literal["", "lavin"]


def build_prompt(problem: Mapping[str, Any], prompt_format: str, caption: str, compat: Compat) -> tuple[str, str]:
    r"""Return prompt (ending in ``Response:``) and answer of a checked problem.

    :param problem: question, choices, answer, hint, lecture and solution.
    :param compat: ``"lavin"`` repeats two slips of LaVIN: AL gives the explanation and AE the lecture, and an
        answer without either keeps a final ``BECAUSE:``.
    """
    given, wanted = prompt_format.split("-")
    lecture, solution = (str(problem.get(name) or "").replace("\n", "\\n") for name in ("lecture", "solution"))
    prompt = _input(problem, given, caption, lecture, solution, compat)
    letter = LETTERS[problem["answer"]]
    return _tidy(f"{prompt}Response:"), _tidy(_output(wanted, letter, lecture, solution, compat))


def _input(problem: Mapping[str, Any], given: str, caption: str, lecture: str, solution: str, compat: Compat) -> str:
    hint = str(problem.get("hint") or "")
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    reasons = " ".join(text for letter, text in (("L", lecture), ("E", solution)) if letter in given)
    because = f"BECAUSE: {reasons}\n" if reasons.strip() or (compat and set("LE") & set(given)) else ""
    lines = {
        "Q": f"Question: {problem['question']}\n",
        "C": f"Context: {f'{hint} {caption}'.strip() or 'N/A'}\n",
        "M": f"Options: {choices}\n",
    }
    shown = [lines.get(letter, "") for letter in given]
    first_reason = next((place for place, letter in enumerate(given) if letter in "LE"), len(given))
    return "".join([*shown[:first_reason], because, *shown[first_reason:]])


def _output(wanted: str, letter: str, lecture: str, solution: str, compat: Compat) -> str:
    if compat and wanted in ("AL", "AE"):
        wanted = {"AL": "AE", "AE": "AL"}[wanted]
    answer = f"The answer is {letter}."
    reasons = " ".join({"L": lecture, "E": solution}[part] for part in wanted if part != "A")
    if wanted == "A":
        return answer
    if wanted.endswith("A"):
        return f"{reasons} {answer}"
    return f"{answer} BECAUSE: {reasons}" if reasons.strip() or compat else answer


def _tidy(text: str) -> str:
    """One pass over double spaces, as the original does; three spaces become two."""
    return text.replace("  ", " ").strip()
