"""How fast an int4 export answers on a CPU, beside onnxruntime-genai and the folder that its own builder makes.

    python benchmarks/decode.py [--model smollm2-135m-instruct] [--threads 2] [--rounds 9] [--work FOLDER]

The base goes through an adapter that changes nothing, so nothing is trained. lavintk writes it as int4 (blocks of
32, embedding and head too, accuracy level 4) and as a Hugging Face folder, and onnxruntime-genai's builder makes its
int4 folder from that one with the same settings. Then the clients take turns, each in a process of its own that waits
idly while the others answer: our runtime, with spinning threads and without, and onnxruntime-genai on our folder, and
onnxruntime-genai on the builder's. onnxruntime-genai spins or not as it does by default. All
read the same random prompt and choose greedily, none stops early. ``--work`` keeps the folders and takes up those that
are there already.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

PACKAGES = ("lavintk", "onnxruntime", "onnxruntime-genai", "torch", "transformers")
BLOCK, LEVEL = 32, 4
"""Weights that share a scale; activations of products are rounded to int8."""
CONTEXT = 2048
"""Tokens that both folders allow for, so that rotary tables do not decide the size."""
Round = tuple[float, float]
"""Seconds to the first new token, and from there to the last."""


def write_base_run(model: str, folder: Path) -> None:
    """Write a run whose adapter is untrained: LoRA starts with ``B = 0``, so the run is the base itself."""
    import torch

    from lavintk.checkpoints import save_model
    from lavintk.models.build import build
    from lavintk.plugins import installed_plugins
    from lavintk.recipe import make_recipe
    from lavintk.run import Run

    records = folder.with_suffix(".json")
    records.write_text(json.dumps([{"instruction": "Say yes.", "input": "", "output": "Yes."}]), encoding="utf-8")
    data = {"train": {"name": "alpaca", "path": str(records)}}
    recipe = make_recipe({"name": "base", "model": {"language": model}, "adapter": "lora", "data": data})
    assembly = build(recipe, installed_plugins(), torch.device("cpu"), torch.float32)
    run = Run.create(folder, recipe)
    save_model(folder, assembly.model, assembly.base["language"]["source"])
    run.record(status="untrained", base=assembly.base)


def write_ours(run: Path, out: Path) -> None:
    """Export as int4 in the same blocks and at the same level as the builder."""
    options = {
        "quant": "int4", "embed_quant": "int4", "head_quant": "int4", "accuracy_level": LEVEL, "adapter": "merge",
        "calibrate": 0, "context_length": CONTEXT,
    }  # fmt: skip
    export(run, "onnx", options, out)


def export(run: Path, name: str, options: dict[str, Any], out: Path) -> None:
    """Export without comparing: there are no test records, and quality is not what is measured here."""
    from lavintk.export import export_run
    from lavintk.registry import Choice
    from lavintk.run import Run

    export_run(Run.open(run), Choice(name, options), out, verify=False)


def write_builders(source: Path, out: Path) -> None:
    """Let onnxruntime-genai's builder make its folder of the Hugging Face folder ``source``."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out.with_suffix(".cache"))]
    command += ["--extra_options", f"block_size={BLOCK}", f"accuracy_level={LEVEL}"]
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if made.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")


def prepare(model: str, work: Path) -> dict[str, Path]:
    """Write what is missing below ``work``; return the two folders to measure."""
    run, plain, ours, builders = (work / name for name in ("run", "hf", "ours", "builder"))
    if not (run / "model").is_dir():
        write_base_run(model, run)
    if not ours.is_dir():
        write_ours(run, ours)
    if not plain.is_dir():
        export(run, "hf", {"dtype": "fp32"}, plain)
    if not (builders / "genai_config.json").is_file():
        write_builders(plain, builders)
    return {"ours": ours, "builder": builders}


def open_ours(
    folder: Path, ids: list[int], new_tokens: int, threads: int, spinning: bool = True
) -> Callable[[], Round]:
    """Return what answers once with lavintk's runtime.

    :param spinning: whether threads keep their core busy while they wait: quick where nothing else runs.
    """
    from lavintk.data.labels import IGNORED, TEXT
    from lavintk.data.tokenize import TokenizedRecord
    from lavintk.runtime.manifest import Manifest
    from lavintk.runtime.model import ExportedModel
    from lavintk.runtime.sessions import Opener

    model = ExportedModel(Manifest.read(folder), Opener(threads=threads, spinning=spinning), 1)
    row = TokenizedRecord("prompt", ids, [IGNORED] * len(ids), [], (), TEXT, 0)
    model.decoder_of(row)

    def answer() -> Round:
        started = time.perf_counter()
        steps = model.steps([row], new_tokens)
        next(steps)
        first = time.perf_counter()
        assert sum(1 for _ in steps) == new_tokens - 1
        return first - started, time.perf_counter() - first

    return answer


def open_genai(folder: Path, ids: list[int], new_tokens: int, threads: int) -> Callable[[], Round]:
    """Return what answers once with onnxruntime-genai; its cache is shared between steps as ours is."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    total = len(ids) + new_tokens

    def answer() -> Round:
        started = time.perf_counter()
        options = genai.GeneratorParams(model)
        # an end of text is not chosen before min_length
        options.set_search_options(max_length=total, min_length=total, do_sample=False, past_present_share_buffer=True)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - first
        assert len(generator.get_sequence(0)) == total
        return first - started, seconds

    return answer


OPENERS: dict[str, Callable[[Path, list[int], int, int], Callable[[], Round]]] = {
    "lavintk.runtime": open_ours,
    "lavintk.runtime, no spinning": partial(open_ours, spinning=False),
    "onnxruntime-genai": open_genai,
}
CLIENTS = (
    ("lavintk.runtime", "ours"),
    ("lavintk.runtime, no spinning", "ours"),
    ("onnxruntime-genai", "ours"),
    ("onnxruntime-genai", "builder"),
)
"""Who reads whose folder; the last one is what the others are compared with."""


def serve(pipe: Connection, client: str, folder: Path, ids: list[int], new_tokens: int, threads: int) -> None:
    """Answer once for each message until one says that it is over."""
    answer = OPENERS[client](folder, ids, new_tokens, threads)
    answer()  # warms up
    gc.collect()
    pipe.send(None)
    while pipe.recv():
        pipe.send(answer())


class Client:
    """A client in a process of its own."""

    def __init__(self, client: str, folder: Path, ids: list[int], new_tokens: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, client, folder, ids, new_tokens, threads), daemon=True
        )
        self.process.start()
        other.close()
        self.pipe.recv()
        self.rounds: list[Round] = []

    def answer(self) -> None:
        """Measure one round."""
        self.pipe.send(True)
        self.rounds.append(self.pipe.recv())

    def close(self) -> None:
        """End the process."""
        self.pipe.send(False)
        self.process.join()


def measure(folders: dict[str, Path], arguments: argparse.Namespace) -> list[list[Round]]:
    """Return the rounds of each client, taken in turns; who begins changes from round to round."""
    config = json.loads((folders["ours"] / "config.json").read_text(encoding="utf-8"))
    # the first ids of vocabularies are often special
    ids = np.random.default_rng(0).integers(300, int(config["vocab_size"]), arguments.prompt_tokens).tolist()
    clients = [Client(name, folders[whose], ids, arguments.new_tokens, arguments.threads) for name, whose in CLIENTS]
    for turn in range(arguments.rounds):
        for place in range(len(clients)):
            clients[(turn + place) % len(clients)].answer()
    for client in clients:
        client.close()
    return [client.rounds for client in clients]


def sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the folder, and those of graphs and weights in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    graphs = [path for path in files if ".onnx" in path.name]
    return sum(path.stat().st_size for path in files), sum(path.stat().st_size for path in graphs)


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(found: list[list[Round]], folders: dict[str, Path], arguments: argparse.Namespace) -> None:
    """Print the table and the ratios."""
    rates = [[(arguments.new_tokens - 1) / rest for _, rest in rounds] for rounds in found]
    head = ("client", "folder", "decode, tokens/s", "fastest round", "first token, ms", "quickest", "of the builder's")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for (client, whose), rate, rounds in zip(CLIENTS, rates, found):
        first = [1000 * seconds for seconds, _ in rounds]
        ratio = statistics.median(own / other for own, other in zip(rate, rates[-1]))
        decode = f"{statistics.median(rate):.1f} | {max(rate):.1f}"
        print(f"| {client} | {whose} | {decode} | {statistics.median(first):.0f} | {min(first):.0f} | {ratio:.2f} |")
    print("\nThe ratio is the median of those within a round.\n")
    for whose, folder in folders.items():
        whole, graphs = sizes(folder)
        print(f"folder {whose}: {whole / 1e6:.1f} MB, graphs and weights {graphs / 1e6:.1f} MB")


def main() -> None:
    """Write both folders, measure in turns and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, help="folder for what is written; by default one that is removed again")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        folders = prepare(arguments.model, work)
        packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
        print(
            f"{arguments.model} as int4 on {processor()}, {os.cpu_count()} cores{load}; {arguments.threads} threads, "
            f"{arguments.prompt_tokens} + {arguments.new_tokens} tokens, {arguments.rounds} rounds in turns\n"
            f"Python {platform.python_version()}, {packages}\n",
            flush=True,
        )
        report(measure(folders, arguments), folders, arguments)


if __name__ == "__main__":
    main()
