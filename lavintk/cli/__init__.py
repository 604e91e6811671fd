"""The command line: a thin layer over the library, one module per command.

Nothing here imports torch before a command needs it, so that ``lavintk --help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import click

from lavintk import __version__
from lavintk.cli import bench, chat, data, doctor, evaluate, export, import_, models, plan, plugins, train, verify
from lavintk.errors import LavintkError
from lavintk.plugins import installed_plugins

REMARKING = ("bitsandbytes.backends.cpu", "torchao", "torch.utils._pytree")
"""Loggers that warn, as soon as their package is imported, of optional parts that nothing here uses."""


def make_group(with_plugins: bool = True) -> click.Group:
    """Return the command line, with the commands of all plugins unless ``with_plugins`` is false."""
    group = click.Group(
        "lavintk",
        help="Adapt a multimodal language model on one GPU, and ship what you trained.",
        params=[click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        no_args_is_help=True,
        callback=lambda debug: None,
    )
    click.version_option(__version__, prog_name="lavintk")(group)
    for command in (
        train.train,
        plan.plan,
        export.export,
        evaluate.evaluate,
        chat.chat,
        bench.bench,
        verify.verify,
        data.data,
        models.models,
        plugins.plugins,
        doctor.doctor,
    ):
        group.add_command(command)
    group.add_command(import_.make_import())
    if with_plugins:
        installed_plugins().add_commands(group)
    return group


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; expected errors are shown without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # wherever it stands
    arguments = [argument for argument in arguments if argument != "--debug"]
    _prepare_environment()
    try:
        doctor_called = arguments[:1] == ["doctor"]  # which has to work beside a broken plugin
        group = make_group(with_plugins=not doctor_called)
        result = group.main(arguments, prog_name="lavintk", standalone_mode=False)
    except LavintkError as error:
        if debug:
            raise
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a file that may not be read
        if debug:
            raise
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {error} (--debug shows where)", err=True)
        return 1
    except Exception as error:  # a mistake in the code, which a plugin may have made
        if note := installed_plugins().blame(error):
            error.add_note(note)
        raise
    return result if isinstance(result, int) else 0


def _prepare_environment() -> None:
    """Keep the libraries' remarks off the terminal, their telemetry off the network, their threads from spinning long.

    torch's OpenMP threads spin while they wait for each other; where anything else runs on the machine, a layer then
    waits for a thread that is not scheduled. Without any spinning, waking them takes a quarter of a small model's step.
    So they spin about as long as it takes until the next operation comes (a count, of GNU's OpenMP).

    oneDNN keeps the code of each shape that it has multiplied, and micro-batches without padding have many: it grows
    by a gigabyte. Some dozens are those of a step.

    The variables count only if they are set before torch is imported.
    """
    for name in REMARKING:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
