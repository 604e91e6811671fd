"""Weights that were published as a difference, such as Vicuna's: base plus delta, tensor by tensor as they are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lavintk.errors import CheckpointError, ModelError
from lavintk.models.meta_source import to_halves
from lavintk.models.sources import FileSource, WeightSource, open_source
from lavintk.models.torch_files import find_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DeltaCompat = Literal["none", "lavin"]
EMBEDDING = "model.embed_tokens.weight"


class BinSource(FileSource):
    """The tensors of ``pytorch_model*.bin``, the form in which deltas were published; found with ``weights_only``."""

    def __init__(self, folder: Path) -> None:
        """Find the tensors; none of their values is read.

        :raises CheckpointError: files that the index names are missing, or files are damaged or refused; all listed.
        """
        super().__init__(str(folder))
        files = sorted(folder.glob("pytorch_model*.bin"))
        index = folder / "pytorch_model.bin.index.json"
        present = {file.name for file in files}
        faults = [f"{file} is missing" for file in sorted(_indexed(index) - present)]
        for file in files:
            try:
                self._tensors |= find_tensors(file)
                self._headers[file] = 0
            except CheckpointError as error:
                faults += [f"{file.name} {fault}" for fault in error.faults]
        if faults:
            raise CheckpointError(str(folder), faults, "Copy or download the delta again.")


def _indexed(index: Path) -> set[str]:
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(index.parent), [f"{index.name} cannot be read: {error}"]) from error


class DeltaSource:
    """A base and a delta in Hugging Face's layout, as one :class:`~lavintk.models.sources.WeightSource`.

    :param compat: ``"lavin"`` puts the rows of q's and k's delta where LaVIN puts them: it adds rows in Hugging Face's
        order to rows in Meta's. Adapters published for Vicuna were trained on that sum.
    """

    def __init__(self, base: WeightSource, delta: WeightSource | FileSource, compat: DeltaCompat = "none") -> None:
        """Compare names and shapes.

        :raises CheckpointError: tensors that only one of both has, or of other shapes; all listed.
        """
        self.base, self.delta, self.compat = base, delta, compat
        self.description = f"{base.description} + {delta.description}"
        _check(base, delta)
        config = base.config()
        self._heads = {
            "q_proj": int(config.num_attention_heads),
            "k_proj": int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        }

    def config(self) -> PretrainedConfig:
        """Return the base's configuration."""
        return self.base.config()

    def names(self) -> list[str]:
        """Return the base's names."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.base.shape(name)

    def nbytes(self) -> int:
        """Return the bytes of both on disk."""
        return sum(map(self.tensor_nbytes, self.names()))

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of a tensor in both."""
        return self.base.tensor_nbytes(name) + (0 if _is_buffer(name) else self.delta.tensor_nbytes(name))

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return base plus delta, summed in fp32, in the type of the base.

        :raises CheckpointError: the data cannot be read.
        """
        value = self.base.read(name, into)
        if _is_buffer(name):
            return value
        change = self.delta.read(name).float()
        projection = name.rpartition(".self_attn.")[2].removesuffix(".weight")
        if self.compat == "lavin" and projection in self._heads:
            # W_Meta + delta in our rows is to_halves(W_Meta) + to_halves(delta), though the delta has our rows already
            change = to_halves(change, self._heads[projection])
        return (value.float() + change).to(value.dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 over both fingerprints and the way of adding."""
        parts = (self.base.fingerprint(), self.delta.fingerprint(), self.compat)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        """Release what base and delta hold open."""
        self.base.close()
        self.delta.close()


def with_delta(base: WeightSource, delta: str | Path, compat: DeltaCompat = "none") -> DeltaSource:
    """Return ``base`` plus the delta in a folder of safetensors or ``pytorch_model*.bin``.

    :raises ModelError: no such folder, or nothing to read in it.
    :raises CheckpointError: the delta is damaged or does not fit the base.
    """
    folder = Path(delta).expanduser()
    if not folder.is_dir():
        raise ModelError(f"no delta at {str(delta)!r} (model.delta): it must be a folder in Hugging Face's layout")
    pickled = any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors"))
    return DeltaSource(base, BinSource(folder) if pickled else open_source(folder), compat)


def _check(base: WeightSource, delta: WeightSource | FileSource) -> None:
    names, changes = set(base.names()), set(delta.names())
    if EMBEDDING in names & changes and base.shape(EMBEDDING)[1:] == delta.shape(EMBEDDING)[1:]:
        rows, added = base.shape(EMBEDDING)[0], delta.shape(EMBEDDING)[0]
        if rows != added:
            raise CheckpointError(
                delta.description,
                [f"its vocabulary has {added} entries, that of {base.description} {rows}"],
                "A delta can only be added to the vocabulary it was made from. Vicuna's v0 deltas add a padding token "
                "(32001 entries); take the v1.1 delta, which has LLaMA's 32000.",
            )
    faults = [
        f"{name} is missing in the delta" for name in base.names() if name not in changes and not _is_buffer(name)
    ]
    faults += [
        f"{name} is not part of the base" for name in delta.names() if name not in names and not _is_buffer(name)
    ]
    faults += [
        f"{name} has shape {list(delta.shape(name))}, that of the base {list(base.shape(name))}"
        for name in base.names()
        if name in changes and delta.shape(name) != base.shape(name)
    ]
    if faults:
        advice = f"Was the delta made from {base.description}, and is it a delta and in Hugging Face's layout?"
        raise CheckpointError(delta.description, faults, advice)


def _is_buffer(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")
