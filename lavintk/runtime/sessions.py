"""Opens graphs with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavintk.errors import ModelError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
Provider = str | tuple[str, dict[str, Any]]


class Opener:
    """Makes inference sessions that share their settings.

    :param providers: onnxruntime's, best first; by default the CPU, whose kernels the exported graphs are made for.
    :param threads: that work on one operator; None leaves the number to onnxruntime (the physical cores).
    :param spinning: threads keep their core busy while they wait for work, as onnxruntime does by default. Quicker on a
        machine that does nothing else; where other programs need the cores, decoding is two to three times as slow.
    :raises ModelError: onnxruntime is missing, lacks a provider, or ``threads`` is below 1.
    """

    def __init__(
        self, providers: Sequence[Provider] | None = None, threads: int | None = None, spinning: bool = True
    ) -> None:
        self.runtime = import_onnxruntime()
        self.providers = list(providers or [CPU])
        if threads is not None and threads < 1:
            raise ModelError(f"threads must be at least 1, got {threads}")
        self.threads, self.spinning = threads, spinning
        known = self.runtime.get_available_providers()
        unknown = [name for entry in self.providers if (name := provider_name(entry)) not in known]
        if unknown:
            raise ModelError(
                f"onnxruntime {self.runtime.__version__} has no {', '.join(unknown)}; it has {', '.join(known)}. "
                "For NVIDIA GPUs install lavintk[gpu] in place of lavintk[cpu]."
            )

    def open(self, path: Path) -> Any:
        """Return the session of a graph.

        :raises ModelError: onnxruntime cannot load it.
        """
        options = self.runtime.SessionOptions()
        options.log_severity_level = 4  # warnings are for authors of graphs, and what fails is raised
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        try:
            return self.runtime.InferenceSession(str(path), options, providers=self.providers)
        except Exception as error:  # onnxruntime has a class of its own for each kind of fault
            raise ModelError(
                f"{path} cannot be loaded by onnxruntime {self.runtime.__version__}: {error}\n"
                "Is the folder complete, with the .onnx_data files beside their graphs? Else export the run anew."
            ) from error


def import_onnxruntime() -> Any:
    """Return the module.

    :raises ModelError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            f"exported folders are run by onnxruntime, which cannot be imported ({error}). Install lavintk[cpu], or "
            "lavintk[gpu] on a machine with an NVIDIA GPU."
        ) from error
    return onnxruntime


def provider_name(provider: Provider) -> str:
    """Return the name of a provider that may come with options."""
    return provider if isinstance(provider, str) else provider[0]


def providers_for(device: str | None) -> list[Provider] | None:
    """Return the providers that a ``--device`` stands for: auto, cpu, cuda or cuda:N.

    :raises ModelError: it is something else.
    """
    if device in (None, "auto", "cpu"):
        return None
    kind, _, index = str(device).partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ModelError(f"{device!r} is not a device; use auto, cpu, cuda or cuda:N")
    return [(CUDA, {"device_id": index or "0"}), CPU]
