"""A decoder graph with its key/value cache, which stays where it is while tokens are added.

The cache is one buffer per layer and part, ``[rows, heads, capacity, size]``. It is bound as the graph's past and as
its present, so that GroupQueryAttention writes new keys and values into it and copies nothing. What attention sees of a
row follows from the row's number of ones in the attention mask, and so do its positions: rows of different lengths are
padded on the right, and the next token of each row overwrites what padding left there. That is exact for prompts (a
causal mask hides what is behind) and for single tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lavintk.errors import ModelError
from lavintk.runtime.sessions import Opener

Array = NDArray[Any]
Lengths = NDArray[np.int64]
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""Element types of caches."""
PREFILL_TOKENS = 512
"""Most tokens of prompts read at a time: enough to keep the cores busy; 49k words make 100 MB of logits."""
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class Decoder:
    """A graph from ids or embeddings to logits.

    :raises ModelError: onnxruntime cannot load it, or its inputs and outputs are not those of lavintk's exports.
    """

    def __init__(self, path: Path, opener: Opener) -> None:
        self.path, self.runtime = path, opener.runtime
        self.session = opener.open(path)
        inputs = {entry.name: entry for entry in self.session.get_inputs()}
        outputs = {entry.name: entry for entry in self.session.get_outputs()}
        self.takes_embeddings = "inputs_embeds" in inputs
        self.input = "inputs_embeds" if self.takes_embeddings else "input_ids"
        self.past = {name: entry for name, entry in inputs.items() if PAST.fullmatch(name)}
        shapes = {tuple(entry.shape[1::2]) for entry in self.past.values()}
        wanted = {self.input, "attention_mask", *self.past}
        present = {_present(name) for name in self.past}
        literal = all(isinstance(number, int) for shape in shapes for number in shape)
        if not self.past or set(inputs) != wanted or not {"logits", *present} <= set(outputs) or not literal:
            raise ModelError(
                f"{path} is no decoder of lavintk's: it takes {', '.join(inputs)} and gives {', '.join(outputs)}; "
                "wanted are input_ids or inputs_embeds, attention_mask and past_key_values.N.key/value with a fixed "
                "number of heads, to logits and present.N.key/value. Export the run anew with `lavintk export`."
            )
        self.vocabulary = int(outputs["logits"].shape[-1])
        self.width = int(inputs[self.input].shape[-1]) if self.takes_embeddings else 0
        self.logits_type = TYPES[outputs["logits"].type]

    def cache(self, rows: int, capacity: int) -> Cache:
        """Return an empty cache for ``rows`` rows of at most ``capacity`` tokens."""
        return Cache(self, rows, capacity)

    def logits(self, inputs: Array, lengths: Lengths) -> Array:
        """Return the logits ``[B, S, vocabulary]`` of whole rows, from scratch.

        :param inputs: ids ``[B, S]`` or embeddings ``[B, S, hidden]``, padded on the right.
        :param lengths: ``[B]`` tokens of each row, the longest of them S.
        """
        rows, longest = inputs.shape[:2]
        empty = {
            name: np.zeros((rows, entry.shape[1], 0, entry.shape[3]), TYPES[entry.type])
            for name, entry in self.past.items()
        }
        feed = {self.input: inputs, "attention_mask": mask_of(lengths, longest), **empty}
        return cast(Array, self.session.run(["logits"], feed)[0])


class Cache:
    """Keys and values of B rows, and the buffers that tokens go in by and logits come out by.

    :ivar lengths: ``[B]`` tokens that each row holds.
    :ivar tokens: ``[B, 1]`` ids, or ``[B, 1, hidden]`` embeddings: what :meth:`step` reads; to be filled in place.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        self.decoder, self.capacity = decoder, capacity
        self.lengths = np.zeros(rows, np.int64)
        shape = (rows, 1, decoder.width) if decoder.takes_embeddings else (rows, 1)
        self.tokens: Array = np.zeros(shape, np.float32 if decoder.takes_embeddings else np.int64)
        self._logits = np.zeros((rows, 1, decoder.vocabulary), decoder.logits_type)
        self._buffers = {
            name: np.zeros((rows, entry.shape[1], capacity, entry.shape[3]), TYPES[entry.type])
            for name, entry in decoder.past.items()
        }
        self._ones = np.ones((1, capacity), np.int64)
        self._stepping = Binding(decoder, self._buffers)
        self._stepping.read(decoder.input, self.tokens)
        self._stepping.write("logits", self._logits)

    def prefill(self, inputs: Array, lengths: Lengths) -> Array:
        """Read prompts into the empty cache and return the logits ``[B, vocabulary]`` behind each.

        The graph computes the logits of every token that it is given, so few tokens are given at a time: short prompts
        together, long ones one by one and in parts (attention takes parts of one row, not of several).

        :param inputs: ids ``[B, S]`` or embeddings ``[B, S, hidden]``, padded on the right.
        :param lengths: ``[B]`` tokens of each row, the longest of them S.
        """
        rows, longest = inputs.shape[:2]
        if rows * longest <= PREFILL_TOKENS:
            found = self._read(slice(0, rows), inputs, lengths)[np.arange(rows), lengths - 1]
        else:
            found = np.stack([self._read_in_parts(row, inputs[row, :length]) for row, length in enumerate(lengths)])
        self.lengths = lengths.copy()
        return found

    def step(self, running: NDArray[np.bool_]) -> Array:
        """Read one token of each row from :attr:`tokens` and return logits ``[B, vocabulary]``, overwritten next time.

        :param running: ``[B]``: rows that grow; others do not, and what comes out for them means nothing.
        """
        self.lengths += running
        longest = int(self.lengths.max())
        one = len(self.lengths) == 1
        self._stepping.read("attention_mask", self._ones[:, :longest] if one else mask_of(self.lengths, longest))
        self._stepping.run()
        return self._logits[:, 0]

    def _read_in_parts(self, row: int, inputs: Array) -> Array:
        """Read one row and return the logits ``[vocabulary]`` behind it."""
        rows = slice(row, row + 1)
        for start in range(0, len(inputs), PREFILL_TOKENS):
            part = inputs[start : start + PREFILL_TOKENS]
            logits = self._read(rows, part[None], np.array([start + len(part)], np.int64))
        last: Array = logits[0, -1].copy()  # not a view, which would keep all of them
        return last

    def _read(self, rows: slice, inputs: Array, lengths: Lengths) -> Array:
        """Read tokens of some rows and return their logits ``[rows, S, vocabulary]``.

        :param lengths: tokens that each of the rows holds afterwards.
        """
        logits = np.empty((*inputs.shape[:2], self.decoder.vocabulary), self.decoder.logits_type)
        binding = Binding(self.decoder, {name: buffer[rows] for name, buffer in self._buffers.items()})
        binding.read(self.decoder.input, np.ascontiguousarray(inputs))
        binding.read("attention_mask", mask_of(lengths, int(lengths.max())))
        binding.write("logits", logits)
        binding.run()
        return logits


class Binding:
    """What a run of the graph reads and writes, by name, in memory that numpy holds.

    :param buffers: of the cache, by the names of the past; each is written where it is read.
    """

    def __init__(self, decoder: Decoder, buffers: Mapping[str, Array]) -> None:
        self._decoder, self._bound = decoder, decoder.session.io_binding()
        self._held: dict[str, Any] = {}  # what is bound must not be freed
        for name, buffer in buffers.items():
            self.read(name, buffer)
            self._bound.bind_ortvalue_output(_present(name), self._held[name][1])

    def read(self, name: str, array: Array) -> None:
        """Bind an input."""
        self._bound.bind_ortvalue_input(name, self._value(name, array))

    def write(self, name: str, array: Array) -> None:
        """Bind an output, of the very shape that comes out."""
        self._bound.bind_ortvalue_output(name, self._value(name, array))

    def run(self) -> None:
        """Run the graph."""
        self._decoder.session.run_with_iobinding(self._bound)

    def _value(self, name: str, array: Array) -> Any:
        value = self._decoder.runtime.OrtValue.ortvalue_from_numpy(array)  # shares the memory of a contiguous array
        self._held[name] = (array, value)
        return value


def mask_of(lengths: Lengths, longest: int) -> Array:
    """Return ``[B, longest]`` int64 with as many ones in each row as it has tokens."""
    return (np.arange(longest) < lengths[:, None]).astype(np.int64)


def padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], Lengths]:
    """Return ids ``[B, S]`` padded on the right, and the length of each row."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return ids, lengths


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")
