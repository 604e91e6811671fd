"""``lavintk chat``: talk with a trained run or an exported folder in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lavintk.answering import RecordAnswerer
    from lavintk.chat import Conversation
    from lavintk.models.build import Assembly

COMMANDS = "/image PATH shows an image with the next question, /reset starts anew, /exit ends."


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--image", type=click.Path(path_type=Path), help="Image to show with the first question.")
@click.option("--system", help="System message.  [default: the recipe's]")
@click.option("--temperature", default=0.1, show_default=True, help="0 always takes the most likely token.")
@click.option("--top-p", default=0.75, show_default=True, help="Draw among the likeliest tokens of this mass.")
@click.option("--top-k", default=0, show_default=True, help="Draw among so many tokens; 0 sets no limit.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an exported folder.")
def chat(
    run: Path,
    image: Path | None,
    system: str | None,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int,
    device: str | None,
    threads: int | None,
) -> None:
    """Talk with the trained model of RUN, or of an exported folder. The default temperature and top-p are LaVIN's.

    In the conversation /image PATH shows an image with the next question, /reset starts anew, /exit (or Ctrl-D) ends;
    Ctrl-C ends an answer early.
    """
    from lavintk.chat import Conversation, image_file
    from lavintk.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, seed)
    shown = None if image is None else image_file(str(image))
    model = _model(run, device, threads)
    conversation = Conversation(model, system=system, sampling=sampling, max_new_tokens=max_new_tokens)
    if shown is not None:
        conversation.show(shown)
    if sys.stdin.isatty():
        click.echo(COMMANDS)
    while (line := _read_line()) is not None and line != "/exit":
        _react(conversation, line)


def _model(folder: Path, device: str | None, threads: int | None) -> RecordAnswerer | Assembly:
    """Load a run by torch, an exported folder by onnxruntime."""
    from lavintk.errors import RunError
    from lavintk.runtime.manifest import is_export

    if is_export(folder):
        from lavintk.runtime import load as load_export
        from lavintk.runtime.sessions import providers_for

        return load_export(folder, providers=providers_for(device), threads=threads)
    if threads is not None:
        raise RunError(f"--threads is for exported folders, which {folder} is none of")
    from lavintk.run import load

    return load(folder, device=device).assembly


def _read_line() -> str | None:
    """Return the next line without surrounding space, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _react(conversation: Conversation, line: str) -> None:
    """Do what a line says; what goes wrong is said, and the conversation goes on."""
    from lavintk.chat import image_file
    from lavintk.errors import LavintkError

    command, _, argument = line.partition(" ")
    try:
        if command == "/image":
            conversation.show(image_file(argument))
        elif command == "/reset":
            conversation.reset()
        elif command.startswith("/") and "/" not in command[1:]:
            click.echo(f"no command {command}. {COMMANDS}", err=True)
        elif line:
            _answer(conversation, line)
    except LavintkError as error:
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {error}", err=True)


def _answer(conversation: Conversation, question: str) -> None:
    try:
        for piece in conversation.ask(question):
            click.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass  # enough of this answer; what came of it is remembered
    click.echo()
