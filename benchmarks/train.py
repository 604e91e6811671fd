"""A shipped LaVIN recipe from its command to its last step: start-up, rows per second and memory, images from files.

    python benchmarks/train.py --geometry 7b --folder lavin-7b --steps 20
    python benchmarks/train.py --geometry 7b --folder lavin-7b --set train.batch_size=12 --set train.accumulate=3
    python benchmarks/train.py --geometry tiny --folder lavin-tiny --steps 3

The folder gets random weights of the geometry, CLIP ViT-L/14's with 7b and 13b, a toy tokenizer, and made-up questions
in ScienceQA's layout: about as long as those of ScienceQA with lectures and solutions, every other one with a PNG file
of its own. What is there already stays. Then ``lavintk train`` runs in a process of its own, as a user starts it; a
step ends when its line appears in ``metrics.jsonl``. Times are medians of the second half of the steps: shapes of packs
that come for the first time take a second longer. Nothing is evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import facts
from load import write_checkpoint
from ours import GIB, geometry
from peers import write_tokenizer

PACKAGES = ("lavintk", "torch", "triton", "transformers", "bitsandbytes")
SHAPES = ("ellipse", "rectangle")
WORDS = 30_000
"""Words of the toy tokenizer that questions are made of."""


def write_models(name: str, folder: Path) -> None:
    """Write language model and vision tower with random weights."""
    import torch
    from geometries import RandomSource
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel

    language, vision = geometry(name)
    write_checkpoint(name, folder / "language")
    write_tokenizer(folder / "language", int(language.vocab_size))
    with torch.device("meta"):
        names = CLIPVisionModel(vision).state_dict()
    source = RandomSource(vision, torch.device("cpu"))
    tensors = {name: source.read(name) for name in names}
    (folder / "vision").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "vision" / "model.safetensors", {"format": "pt"})
    vision.architectures = ["CLIPVisionModel"]
    vision.save_pretrained(folder / "vision")
    side = {"height": vision.image_size, "width": vision.image_size}
    colour = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": side, "crop_size": side, **colour}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(processor))


def write_questions(folder: Path, count: int) -> None:
    """Write ``count`` problems to train on, every other one with a picture."""
    draw = random.Random(0)
    problems = {}
    for number in range(count):
        picture = "image.png" if number % 2 else None
        if picture is not None:
            write_picture(folder / "images" / "train" / str(number) / picture, draw)
        problems[str(number)] = {
            "question": words(draw, 12, 25), "choices": [words(draw, 1, 5) for _ in range(draw.choice([2, 3, 4]))],
            "answer": 0, "hint": words(draw, 0, 30), "image": picture, "task": "closed choice",
            "grade": f"grade{draw.randint(1, 12)}", "subject": "natural science", "topic": "physics",
            "category": "made up", "skill": "made up", "lecture": words(draw, 0, 110), "solution": words(draw, 15, 50),
            "split": "train",
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems)}))


def words(draw: random.Random, fewest: int, most: int) -> str:
    """Return so many made-up words, a token each."""
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(fewest, most)))


def write_picture(path: Path, draw: random.Random) -> None:
    """Write a PNG file with some shapes, as wide as ScienceQA's usually are."""
    from PIL import Image, ImageDraw

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.effect_noise((draw.randint(300, 750), draw.randint(200, 450)), 12).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    for _ in range(20):
        left, top = draw.randrange(picture.width - 40), draw.randrange(picture.height - 40)
        box = (left, top, left + draw.randint(10, 200), top + draw.randint(10, 200))
        getattr(canvas, draw.choice(SHAPES))(box, fill=tuple(draw.randrange(256) for _ in range(3)))
    picture.save(path)


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    """Return the command line that trains."""
    folder = arguments.folder
    assignments = [
        f"data.train=scienceqa:path={folder / 'scienceqa'},prompt_format=QCM-ALE", "data.validation=null",
        "data.test=null", f"train.max_steps={arguments.steps}", *arguments.assignments,
    ]  # fmt: skip
    return [
        sys.executable, "-m", "lavintk", "train", arguments.recipe, "--model", str(folder / "language"),
        "--vision", str(folder / "vision"), "--out", str(out), *(f"--set={pair}" for pair in assignments),
    ]  # fmt: skip


def run(arguments: argparse.Namespace, out: Path) -> tuple[list[float], list[str]]:
    """Train; return when each step ended, in seconds from the start of the command, and what was said, with its time.

    :raises SystemExit: the command failed.
    """
    ends: list[float] = []
    said: list[str] = []
    metrics = out / "metrics.jsonl"
    begun = time.perf_counter()

    def listen(stream: IO[str]) -> None:
        for line in stream:
            said.append(f"{time.perf_counter() - begun:5.1f} s  {line.rstrip()}")

    with subprocess.Popen(
        command(arguments, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        listener = threading.Thread(target=listen, args=(process.stdout,))
        listener.start()
        while process.poll() is None:
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            ends += [time.perf_counter() - begun] * (lines - len(ends))
            time.sleep(0.02)
        listener.join()
    if process.returncode:
        raise SystemExit("\n".join([f"it ended with code {process.returncode}:", *said]))
    return ends, said


def report(ends: list[float], said: list[str], out: Path) -> dict[str, Any]:
    """Return what was measured."""
    manifest = json.loads((out / "manifest.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = manifest["recipe"]["train"]["batch_size"] * manifest["recipe"]["train"]["accumulate"]
    times = [after - before for before, after in pairwise(ends)]
    later = times[len(times) // 2 :]  # by then most shapes are recorded
    return {
        "first_step_done_s": round(ends[0], 1), "step_s": round(statistics.median(later), 3),
        "rows_per_step": rows, "rows_s": round(rows / statistics.median(later), 1),
        "rows_s_from_the_second_step_on": round(rows * len(times) / sum(times), 1),
        "tokens_per_row": round(sum(step["tokens"] for step in steps) / len(steps) / rows),
        "peak_gib": round(manifest["peak_memory_bytes"] / GIB, 2),
        "predicted_gib": round(manifest.get("predicted_memory_bytes", 0) / GIB, 2) or None,
        "said": said,
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lavin-7b-lite")
    parser.add_argument("--geometry", choices=("7b", "13b", "tiny"), default="7b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=1280)
    parser.add_argument("--set", action="append", dest="assignments", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Write what is missing, train, print and keep the figures."""
    arguments = parse_arguments()
    if not (arguments.folder / "vision" / "config.json").exists():
        write_models(arguments.geometry, arguments.folder)
    if not (arguments.folder / "scienceqa" / "problems.json").exists():
        write_questions(arguments.folder / "scienceqa", arguments.questions)
    out = arguments.folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    environment = facts.environment(PACKAGES)
    print("\n".join(facts.in_words(environment)), flush=True)
    ends, said = run(arguments, out)
    found = report(ends, said, out)
    print("\n".join(found["said"]))
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "said"), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
