"""An exported model, ready to answer: the prompts of training, the graphs of the folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from lavintk.answering import RecordAnswerer
from lavintk.data.labels import IGNORED, IMAGE
from lavintk.data.records import ImageSource, Message, Record
from lavintk.data.template import make_template
from lavintk.data.tokenize import TokenizedRecord
from lavintk.errors import DataError, ModelError, OutOfMemoryError
from lavintk.registry import Choice
from lavintk.runtime.decoder import Decoder, padded
from lavintk.runtime.manifest import Manifest, as_choice
from lavintk.runtime.sampling import log_likelihood, make_sampler
from lavintk.runtime.sessions import Opener, Provider
from lavintk.runtime.tokenizer import ExportedTokenizer
from lavintk.sampling import Sampling

if TYPE_CHECKING:
    from lavintk.contracts import EvaluationResult

Array = NDArray[Any]
BATCH_SIZE = 8
"""Rows answered at a time: enough to read each weight for several rows, few enough for a small machine's memory."""
LOGIT_BYTES = 256 * 2**20
"""Most memory for the logits of whole rows that are computed together; a longer row is computed alone."""
REMEMBERED_IMAGES = 32
"""Images whose visual tokens are kept: a conversation and the choices of a question show one again and again."""
NEW_TOKENS = 16
"""Longest answer of an evaluation where neither the caller nor the recipe sets one."""


def load(
    folder: str | os.PathLike[str],
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    spinning: bool = True,
    batch_size: int = BATCH_SIZE,
) -> ExportedModel:
    """Open an exported folder; graphs are loaded when they are first needed.

    :param providers: onnxruntime's execution providers, best first; by default the CPU.
    :param threads: that work on one operator; by default as many as there are physical cores.
    :param spinning: whether threads keep their core busy while they wait; false is better beside other programs.
    :param batch_size: rows answered at a time.
    :raises ModelError: no exported folder, a broken one, or onnxruntime is missing.
    """
    return ExportedModel(Manifest.read(Path(folder)), Opener(providers, threads, spinning), batch_size)


class ExportedModel(RecordAnswerer):
    """An :class:`lavintk.contracts.AnsweringModel` over an exported folder; made by :func:`load`.

    A record with images is answered by the decoder of the image modality, any other by that of text, where the folder
    has two.
    """

    def __init__(self, manifest: Manifest, opener: Opener, batch_size: int = BATCH_SIZE) -> None:
        tokenizer = ExportedTokenizer.from_folder(manifest.folder)
        template = make_template(
            tokenizer, manifest.template, system=manifest.system, visual_tokens=manifest.visual_tokens
        )
        super().__init__(template, tokenizer, manifest.images, batch_size)
        self.manifest, self._opener = manifest, opener
        self._decoders: dict[Path, Decoder] = {}
        self._sessions: dict[Path, Any] = {}
        self._seen: OrderedDict[ImageSource, Array] = OrderedDict()

    @property
    def context_length(self) -> int | None:
        """Tokens that the decoders can read, prompt and answer together."""
        return self.manifest.context_length

    @contextmanager
    def enough_memory(self, advice: Callable[[], str]) -> Iterator[None]:
        """Turn a refused allocation into an error that says what to lower."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, MemoryError) and "Failed to allocate memory" not in str(error):
                raise
            raise OutOfMemoryError(f"the machine ran out of memory while answering: {error}. {advice()}") from error

    def generate(
        self,
        prompt: str,
        image: ImageSource | str | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """Answer one prompt, with an image if given.

        :param image: path or encoded bytes of an image.
        :param stop: texts in front of which the answer ends.
        """
        images = () if image is None else (Path(image) if isinstance(image, str) else image,)
        record = Record("prompt", (Message("user", prompt),), images)
        return "".join(self.stream(record, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop))

    def logits(self, record: Record) -> Array:
        """Return the logits ``[N, vocabulary]`` of the N tokens of a record's training row, answers included."""
        return self.row_logits([self.template.tokenize_record(record)])[0]

    def logits_batch(self, records: Sequence[Record]) -> list[Array]:
        """Return :meth:`logits` of each record, computed several rows at a time; all of them are held in memory."""
        return self.row_logits([self.template.tokenize_record(record) for record in records])

    def row_logits(self, rows: Sequence[TokenizedRecord]) -> list[Array]:
        """Return the logits ``[N, vocabulary]`` of each row, in order.

        :raises DataError: a row is longer than the model can read.
        """
        found: list[Array] = [np.empty(0)] * len(rows)
        for chosen in self._groups(rows):
            for part in self._within_memory(rows, chosen):
                for i, logits in zip(part, self._whole([rows[i] for i in part])):
                    found[i] = logits
        return found

    def evaluate(
        self,
        data: str | Choice | None = None,
        *,
        split: str | None = None,
        evaluation: str | Choice | None = None,
        scoring: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
    ) -> EvaluationResult:
        """Score the exported model; without arguments, on the test data of the recipe it was trained by.

        :param evaluation: by default the one called like the format of ``data``, where there is one, else the recipe's.
        :param scoring: the evaluation's option of this name, for example ``"likelihood"``.
        :raises RunError: neither ``data`` nor the folder names records to answer, or a number is below 1.
        """
        from lavintk.plugins import installed_plugins
        from lavintk.run import load_records
        from lavintk.scoring import check_numbers, choose_test

        check_numbers(max_new_tokens=max_new_tokens, batch_size=batch_size)
        settings = self.manifest.evaluation
        chosen, scorer = choose_test(
            data, evaluation, scoring,
            own_data=self.manifest.test_data(), own_evaluation=as_choice(settings.get("name")),
            owner="the exported folder",
        )  # fmt: skip
        self.batch_size = batch_size or self.batch_size
        longest = max_new_tokens or int(settings.get("max_new_tokens") or NEW_TOKENS)
        records = load_records(chosen, split or str(settings.get("split") or "test"))

        def advice() -> str:
            return f"Lower the evaluation's batch_size (now {self.batch_size}) or max_new_tokens (now {longest})."

        with self.enough_memory(advice):
            return installed_plugins().evaluations.create(scorer).evaluate(self, records, max_new_tokens=longest)

    # Which rows go together

    def _groups(self, rows: Sequence[TokenizedRecord]) -> Iterator[list[int]]:
        """Yield the indices of rows of one modality that go together, shortest first."""
        for wanted in dict.fromkeys(self._graph(row) for row in rows):
            places = [i for i, row in enumerate(rows) if self._graph(row) == wanted]
            for group in super()._groups([rows[i] for i in places]):
                yield [places[i] for i in group]

    def _within_memory(self, rows: Sequence[TokenizedRecord], chosen: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split a group so that its logits stay within :data:`LOGIT_BYTES`."""
        longest = max(len(rows[i]) for i in chosen)
        per_row = longest * self.decoder_of(rows[chosen[0]]).vocabulary * 4
        count = max(1, LOGIT_BYTES // per_row)
        for start in range(0, len(chosen), count):
            yield chosen[start : start + count]

    # Graphs

    def decoder_of(self, row: TokenizedRecord) -> Decoder:
        """Return the decoder of a row's modality, loaded on first use."""
        path = self._graph(row)
        if path not in self._decoders:
            self._decoders[path] = Decoder(path, self._opener)
            if self._decoders[path].takes_embeddings and self.manifest.embed_tokens is None:
                raise ModelError(f"{path} takes embeddings, but {self.manifest.folder} has no graph that makes them")
        return self._decoders[path]

    def _graph(self, row: TokenizedRecord) -> Path:
        decoders = self.manifest.decoders
        return decoders.get("all") or decoders["image" if row.condition == IMAGE else "text"]

    def _session(self, path: Path | None) -> Any:
        assert path is not None
        if path not in self._sessions:
            self._sessions[path] = self._opener.open(path)
        return self._sessions[path]

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Return the embeddings ``[B, S, hidden]`` of ids ``[B, S]``."""
        return cast(Array, self._session(self.manifest.embed_tokens).run(["inputs_embeds"], {"input_ids": ids})[0])

    def see(self, pixels: NDArray[np.float32]) -> Array:
        """Return the visual tokens ``[I * visual_tokens, hidden]`` of images ``[I, 3, height, width]``."""
        found = self._session(self.manifest.vision).run(["image_features"], {"pixel_values": pixels})
        return cast(Array, found[0])

    def image_features(self, source: ImageSource, record_id: str = "image") -> Array:
        """Return the visual tokens ``[visual_tokens, hidden]`` of an image.

        :raises DataError: the image cannot be read.
        """
        if source in self._seen:
            self._seen.move_to_end(source)
            return self._seen[source]
        if self.images is None:
            raise DataError("the data", [f"record {record_id!r} has an image, but the model takes none"])
        features = self.see(self.images.pixels(source, record_id)[None])
        if features.shape[0] != self.manifest.visual_tokens:
            raise ModelError(
                f"{self.manifest.vision} gives {features.shape[0]} visual tokens for an image, the folder says "
                f"{self.manifest.visual_tokens}. Export the run anew with `lavintk export`."
            )
        self._seen[source] = features
        if len(self._seen) > REMEMBERED_IMAGES:
            self._seen.popitem(last=False)
        return features

    def _inputs(self, decoder: Decoder, rows: Sequence[TokenizedRecord]) -> tuple[Array, NDArray[np.int64]]:
        """Return what the decoder reads, ids or embeddings with images in their slots, and the rows' lengths."""
        ids, lengths = padded([row.input_ids for row in rows])
        self._check_lengths(rows)
        if not decoder.takes_embeddings:
            return ids, lengths
        embedded = self.embed(ids)
        for place, row in enumerate(rows):
            if row.images:
                features = [self.image_features(source, row.id) for source in row.images]
                embedded[place, row.visual_slots] = np.concatenate(features)
        return embedded, lengths

    def _check_lengths(self, rows: Sequence[TokenizedRecord]) -> None:
        limit = self.context_length
        faults = [
            f"record {row.id!r}: {len(row)} tokens, the model reads at most {limit}"
            for row in rows
            if limit is not None and len(row) > limit
        ]
        if faults:
            raise DataError("the data", faults)

    def _whole(self, rows: Sequence[TokenizedRecord]) -> list[Array]:
        """Return the logits of each row; all are of one modality."""
        decoder = self.decoder_of(rows[0])
        inputs, lengths = self._inputs(decoder, rows)
        logits = decoder.logits(inputs, lengths)
        return [logits[place, :length] for place, length in enumerate(lengths)]

    def _totals(self, rows: Sequence[TokenizedRecord]) -> list[float]:
        """Return the log-likelihood of each row's labels; all are of one modality."""
        totals = [0.0] * len(rows)
        for part in self._within_memory(rows, range(len(rows))):
            for i, logits in zip(part, self._whole([rows[i] for i in part])):
                labels = np.array(rows[i].labels, np.int64)
                labelled = np.flatnonzero(labels != IGNORED)
                totals[i] = log_likelihood(logits[labelled], labels[labelled])
        return totals

    def _steps(
        self, rows: Sequence[TokenizedRecord], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        yield from self.steps(rows, max_new_tokens, sampling, frozenset(self.template.stop_ids))

    def steps(
        self,
        rows: Sequence[TokenizedRecord],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> Iterator[list[int | None]]:
        """Yield the next id of each row, all of one modality, step by step; None for rows that have stopped.

        A row stops at an id in ``stop`` (which is yielded) and where the model can read no further.

        :raises DataError: a prompt is longer than the model can read, or an image cannot be read.
        """
        decoder, draw = self.decoder_of(rows[0]), make_sampler(sampling or Sampling())
        inputs, lengths = self._inputs(decoder, rows)
        limit = min(int(lengths.max()) + max_new_tokens, self.context_length or 2**31)
        cache = decoder.cache(len(rows), max(limit, int(lengths.max())))
        running = np.ones(len(rows), np.bool_)
        logits = cache.prefill(inputs, lengths)
        for step in range(max_new_tokens):
            tokens = draw(logits)
            drawn: list[int] = tokens.tolist()
            yield [token if alive else None for token, alive in zip(drawn, running)]
            running &= np.array([token not in stop for token in drawn]) & (cache.lengths < limit)
            if not running.any() or step + 1 == max_new_tokens:
                return
            ids = tokens[:, None].astype(np.int64)
            cache.tokens[:] = self.embed(ids) if decoder.takes_embeddings else ids
            logits = cache.step(running)
