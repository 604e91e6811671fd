import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lavintk.plugins import installed_plugins


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, with the reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # takes seconds: only where a test asks for a GPU

    if not torch.cuda.is_available():
        reason = f"needs a CUDA device, and torch {torch.__version__} sees none"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test an empty cache directory, the same random numbers and none of the developer's own settings."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    monkeypatch.setenv("LAVINTK_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("LAVINTK_DISABLE", "LAVINTK_TRACE", "LAVINTK_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    yield
    installed_plugins.cache_clear()


@pytest.fixture
def install_plugin(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Return a function that installs a plugin as pip would: a module and a distribution on the path.

    ``install_plugin("hello", "<source>")`` makes the module ``lavintk_hello`` and the entry point ``hello``.
    The distribution is ``lavintk-hello`` unless another is named. All is gone after the test.
    """
    modules: list[str] = []

    def install(name: str, source: str, *, distribution: str = "", version: str = "1.2.3") -> Path:
        distribution = distribution or f"lavintk-{name}"
        module = distribution.replace("-", "_")
        site = tmp_path_factory.mktemp("site")
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        metadata = site / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[lavintk]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(site)
        modules.append(module)
        return site

    yield install
    for module in modules:
        sys.modules.pop(module, None)
