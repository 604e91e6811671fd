"""Meta's own LLaMA folders: ``consolidated.NN.pth``, one or several, with ``params.json``.

The shards hold slices of the matrices under Meta's names. Here a matrix is put together when it is read, under the
name and in the row order of ``transformers``.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavintk.errors import CheckpointError, ModelError, did_you_mean
from lavintk.models.sources import StoredTensor, fingerprint, read_tensor
from lavintk.models.torch_files import find_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

PARAMS = "params.json"
SHARDS = re.compile(r"consolidated\.(\d+)\.pth")
REQUIRED = ("dim", "n_layers", "n_heads")
OPTIONAL = ("norm_eps", "vocab_size", "n_kv_heads", "rope_theta", "multiple_of", "ffn_dim_multiplier")
"""``multiple_of`` and ``ffn_dim_multiplier`` say how wide the feed-forward layers are, as the tensors do themselves."""
NORM_EPS = 1e-5
"""Of the model's code, where ``params.json`` has none."""

ROWS, COLUMNS, COPIED = 0, 1, None
TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", COPIED),
    "output.weight": ("lm_head.weight", ROWS),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "attention_norm.weight": ("input_layernorm.weight", COPIED),
    "ffn_norm.weight": ("post_attention_layernorm.weight", COPIED),
}
"""Meta's names to ours, and along which axis the shards split a matrix."""


def is_meta_folder(folder: Path) -> bool:
    """Say whether a folder holds Meta's files and is no Hugging Face folder."""
    if (folder / "config.json").is_file():
        return False
    return (folder / PARAMS).is_file() or bool(shards(folder))


def shards(folder: Path) -> dict[int, Path]:
    """Return the shards in ``folder`` by number."""
    found = ((SHARDS.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of q or k in transformers' order: rotary pairs (j, j + d/2) instead of Meta's (2j, 2j + 1).

    :param weight: ``[heads * d, ...]``.
    """
    rest = weight.shape[1:]
    return weight.view(heads, -1, 2, *rest).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Pieces:
    """The slices of one tensor, in the order of the shards.

    :param axis: along which they are joined; None: each shard has the whole.
    """

    slices: tuple[StoredTensor, ...]
    axis: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        first = self.slices[0].shape
        if self.axis is None:
            return first
        whole = sum(piece.shape[self.axis] for piece in self.slices)
        return (*first[: self.axis], whole, *first[self.axis + 1 :])

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(piece.nbytes for piece in (self.slices if self.axis is not None else self.slices[:1]))

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the whole; memory holds it and its slices for a moment.

        :param into: where a whole of one slice is read to.
        :raises EOFError: a file ends before a slice does.
        """
        import torch

        if self.axis is None or len(self.slices) == 1:
            return read_tensor(self.slices[0], into)
        return torch.cat([read_tensor(piece) for piece in self.slices], dim=self.axis)


class MetaSource:
    """A folder of Meta's, as a :class:`~lavintk.models.sources.WeightSource`."""

    def __init__(self, folder: Path, description: str | None = None) -> None:
        """Read ``params.json`` and find the tensors in the shards; none of their values is read.

        :raises ModelError: ``params.json`` is missing or describes something else.
        :raises CheckpointError: shards are missing, damaged or contradict each other, all listed.
        """
        self.path, self.description = folder, description or str(folder)
        self.params = _read_params(folder)
        files = shards(folder)
        if not files:
            raise ModelError(f"{folder} holds {PARAMS}, but no consolidated.NN.pth. Copy the weights beside it.")
        self.files = tuple(files.values())
        faults = [f"consolidated.{number:02}.pth is missing" for number in range(max(files) + 1) if number not in files]
        found: list[dict[str, StoredTensor]] = []
        for file in self.files:
            try:
                found.append(find_tensors(file))
            except CheckpointError as error:
                faults += [f"{file.name} {fault}" for fault in error.faults]
        if not faults:
            faults = _missing_shards(found[0], len(found), int(self.params["dim"]))
        self._pieces: dict[str, Pieces] = {}
        if not faults:
            self._pieces, faults = _join(self.files, found, int(self.params["dim"]))
        if faults:
            raise CheckpointError(self.description, faults, "Copy or download the files of this model again.")

    def config(self) -> PretrainedConfig:
        """Return the ``LlamaConfig`` that ``params.json`` and the tensors describe.

        :raises CheckpointError: tensors that are needed for it are missing.
        """
        from transformers import LlamaConfig

        needed = ("lm_head.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.k_proj.weight")
        if missing := [f"{name} is missing" for name in needed if name not in self._pieces]:
            raise CheckpointError(self.description, missing)
        vocabulary, feed_forward, _ = (self._pieces[name].shape[0] for name in needed)
        said = int(self.params.get("vocab_size", -1))
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.params["dim"],
            intermediate_size=feed_forward,
            num_hidden_layers=self.params["n_layers"],
            num_attention_heads=self.params["n_heads"],
            num_key_value_heads=self._key_value_heads(),
            vocab_size=said if said > 0 else vocabulary,
            rms_norm_eps=self.params.get("norm_eps", NORM_EPS),
            rope_parameters={"rope_type": "default", "rope_theta": float(self.params.get("rope_theta", 10000.0))},
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )

    def names(self) -> list[str]:
        """Return transformers' names; what Meta's models do not have keeps its own."""
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._pieces[name].shape

    def nbytes(self) -> int:
        """Return the bytes that reading every tensor takes from disk."""
        return sum(pieces.nbytes for pieces in self._pieces.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes that reading one tensor takes from disk."""
        return self._pieces[name].nbytes

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor in the type it is stored in, its rows in transformers' order.

        :raises CheckpointError: a file changed or cannot be read any more.
        """
        pieces = self._pieces[name]
        try:
            value = pieces.read(into)
        except (OSError, EOFError) as error:
            raise CheckpointError(self.description, [f"{name}: {error}"]) from error
        if name.endswith(".q_proj.weight"):
            return to_halves(value, int(self.params["n_heads"]))
        if name.endswith(".k_proj.weight"):
            return to_halves(value, self._key_value_heads())
        return value

    def fingerprint(self) -> str:
        """Return a SHA-256 over ``params.json`` and what :func:`lavintk.models.sources.fingerprint` makes of shards."""
        digest = hashlib.sha256(json.dumps(self.params, sort_keys=True).encode())
        for number, file in enumerate(self.files):
            slices = (p.slices[number] for p in self._pieces.values())
            digest.update(fingerprint({file: 0}, slices).encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Do nothing: no file is held open."""

    def _key_value_heads(self) -> int:
        return int(self.params.get("n_kv_heads") or self.params["n_heads"])


def _read_params(folder: Path) -> dict[str, Any]:
    """Return ``params.json``.

    :raises ModelError: all that is wrong with it.
    """
    file = folder / PARAMS
    if not file.is_file():
        raise ModelError(
            f"{folder} holds {next(iter(shards(folder).values())).name}, but no {PARAMS}, which says how the model is "
            "built. Copy the one that came with the weights into it."
        )
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(params, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(params).__name__}")
    known = (*REQUIRED, *OPTIONAL)
    faults = [f"{key} is missing" for key in REQUIRED if key not in params]
    faults += [
        f"{key} is not known, so the model may not be what it would be taken for.{did_you_mean(key, known)}"
        for key in params
        if key not in known
    ]
    faults += [
        f"{key} must be a number, got {value!r}"
        for key, value in params.items()
        if key in known and (isinstance(value, bool) or not isinstance(value, int | float))
        and not (value is None and key in OPTIONAL)
    ]  # fmt: skip
    if not faults:
        faults = _geometry_faults(params)
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ModelError(f"{file} cannot be followed:\n{listed}\nKnown keys: {', '.join(known)}.")
    return {key: value for key, value in params.items() if value is not None}


def _geometry_faults(params: dict[str, Any]) -> list[str]:
    counts = ("dim", "n_layers", "n_heads", "n_kv_heads")
    faults = [
        f"{key} must be a whole number above 0, got {params[key]!r}"
        for key in counts
        if params.get(key) is not None and (params[key] < 1 or params[key] != int(params[key]))
    ]
    if faults:
        return faults
    dim, heads = params["dim"], params["n_heads"]
    if dim % heads or dim // heads % 2:
        faults.append(f"dim {dim} does not give each of {heads} heads an even width")
    if heads % (params.get("n_kv_heads") or heads):
        faults.append(f"n_heads {heads} is not a multiple of n_kv_heads {params['n_kv_heads']}")
    return faults


def _missing_shards(shard: dict[str, StoredTensor], count: int, dim: int) -> list[str]:
    """Return the shards that should be there by what one of them holds."""
    rows = shard["layers.0.attention.wq.weight"].shape[:1] if "layers.0.attention.wq.weight" in shard else ()
    if not rows or not rows[0] or dim % rows[0]:
        return []  # which is told apart later, tensor by tensor
    wanted = dim // rows[0]
    if wanted < count:
        return [f"{count} shards are there, but by wq's {rows[0]} rows of {dim} there should be {wanted}"]
    return [
        f"consolidated.{number:02}.pth is missing: each shard holds 1/{wanted} of the model"
        for number in range(count, wanted)
    ]


def _join(
    files: tuple[Path, ...], found: list[dict[str, StoredTensor]], dim: int
) -> tuple[dict[str, Pieces], list[str]]:
    """Return the tensors of all shards under our names, and what contradicts between the shards."""
    pieces: dict[str, Pieces] = {}
    faults = []
    for name in dict.fromkeys(name for shard in found for name in shard):
        if name.endswith("rope.freqs"):
            continue  # a table that the model computes itself
        lacking = [file.name for file, shard in zip(files, found) if name not in shard]
        if lacking:
            faults.append(f"{name} is missing in {', '.join(lacking)}")
            continue
        slices = tuple(shard[name] for shard in found)
        ours, axis = _translate(name)
        if name == "tok_embeddings.weight" and slices[0].shape[1:] == (dim,):
            axis = ROWS  # Llama 3 splits the vocabulary
        if min(len(piece.shape) for piece in slices) < 2:
            axis = COPIED
        if axis is not None and len({_other_axes(piece.shape, axis) for piece in slices}) > 1:
            shapes = ", ".join(str(list(piece.shape)) for piece in slices)
            faults.append(f"{name} cannot be joined along axis {axis}: the shards hold {shapes}")
            continue
        pieces[ours] = Pieces(slices, axis)
    return pieces, faults


def _translate(name: str) -> tuple[str, int | None]:
    """Return our name and the axis along which shards split the tensor; an unknown name stays."""
    if name in TOP:
        return TOP[name]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in LAYER:
        ours, axis = LAYER[layer[2]]
        return f"model.layers.{layer[1]}.{ours}", axis
    return name, COPIED


def _other_axes(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (len(shape), *shape[:axis], *shape[axis + 1 :])
