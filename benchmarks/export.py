"""How long exporting a large model takes, and how much host memory.

    python benchmarks/export.py --geometry 7b --folder checkpoint-7b --quant int4

A random 16-bit checkpoint of the geometry is written first unless the folder holds one. The run that is exported has a
LoRA adapter with random values on all linear layers; no training takes place, and the folder is not compared with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import psutil
import torch
from geometries import LANGUAGE
from load import AnonymousPeak, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lavintk.checkpoints import save_model
from lavintk.export import export_run
from lavintk.models.build import build
from lavintk.plugins import installed_plugins
from lavintk.recipe import make_recipe
from lavintk.registry import Choice
from lavintk.run import Run


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of a few words: an export needs one, its size does not matter here."""
    words = {word: place for place, word in enumerate(("<s>", "</s>", "<unk>", "word"))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_run(checkpoint: Path, quant: str, folder: Path) -> Run:
    """Return a run with a random adapter over ``checkpoint``."""
    recipe = make_recipe(
        {
            "name": "export",
            "model": {"language": str(checkpoint)},
            "quant": quant,
            "adapter": "lora",
            "data": {"train": "alpaca:none.json", "template": "plain"},
        }
    )
    assembly = build(recipe, installed_plugins(), torch.device("cpu"), torch.bfloat16, stream=True)
    assert assembly.model.adapter is not None
    for _, parameter in assembly.model.adapter.named_parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    run = Run.create(folder, recipe)
    save_model(folder, assembly.model, assembly.base["language"]["source"])
    run.record(status="finished", precision="bfloat16", base=assembly.base)
    return run


def main() -> None:
    """Export once and print time, size and peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=LANGUAGE, default="7b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quant", default="int4", help="grid that the base is trained on")
    parser.add_argument("--export", default="onnx", help="format with options")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").exists():
        write_checkpoint(arguments.geometry, arguments.folder)
    write_tokenizer(arguments.folder)
    made, out = arguments.folder / "run", arguments.folder / "exported"
    for old in (made, out):
        shutil.rmtree(old, ignore_errors=True)
    run = make_run(arguments.folder, arguments.quant, made)
    sampler = AnonymousPeak()
    sampler.start()
    started = time.perf_counter()
    export_run(run, Choice.parse(arguments.export), out, verify=False)
    seconds, peak = time.perf_counter() - started, sampler.stop()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(
        f"{arguments.geometry}, trained on {arguments.quant}, as {arguments.export}: {seconds:.0f} s, "
        f"{size / 1e9:.2f} GB, "
        f"host peak {peak / 1e9:.2f} GB (without mapped files); {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, torch {torch.__version__}"
    )
    shutil.rmtree(made)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
