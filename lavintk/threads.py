"""Work on the CPU that is cut into pieces, each of which one thread computes alone.

Torch spreads every single operation over its threads and waits for the last of them. Where many operations follow each
other on the same data, that costs more than it gains: it is better to give each thread its own piece of the data, small
enough to stay in the cache of its core. Torch's operations run beside each other because they let go of Python's lock;
pieces have to be large enough that most of the time is spent in them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def each(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
    """Return ``work`` of each piece, in order, computed by as many threads as torch has.

    Within ``work`` torch uses one thread, so results do not depend on their number. Gradients are not recorded.

    :raises Exception: what ``work`` raises; pieces that have not begun by then are left out.
    """
    pieces, threads = list(pieces), torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(piece: Piece) -> Result:
        # both modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            return work(piece)

    if threads == 1 or len(pieces) == 0:
        return [run(piece) for piece in pieces]
    return list(_pool(threads).map(run, pieces))


def slices(length: int, step: int) -> list[slice]:
    """Return slices of at most ``step`` that cover ``length``."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool of threads in each of which torch uses one thread; it is kept.

    ``torch.set_num_threads`` sets the number of the thread that calls it, and what other threads take over when torch
    does its first work in them. So the calling thread sets its own again, and theirs stays.
    """
    all_here = Barrier(threads)

    def settle() -> None:
        torch.get_num_threads()  # counts as work; without it the first operation would undo what follows
        torch.set_num_threads(1)
        all_here.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="lavintk-piece", initializer=settle)
    list(pool.map(int, range(threads)))  # each starts a thread, as none is idle before all are there
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
