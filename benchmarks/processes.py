"""Measuring in a process of its own: what it tells the one that started it, and how it ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

MARK = "@benchmark "
"""Begins the lines that the process writes for us; libraries write others in between."""

Message = dict[str, Any]


def tell(message: Message) -> None:
    """Write a message to the process that started this one."""
    print(MARK + json.dumps(message), flush=True)


def messages(script: str, arguments: Sequence[str], seconds: float, name: str) -> Iterator[Message]:
    """Run ``script`` and yield what it tells; the last message says how it ended.

    :param seconds: it is stopped after so long. :param name: what the last message calls it.
    """
    log: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(0.0, seconds), stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
                elif line.strip():
                    log.append(line.strip())
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        yield {"ended": f"stopped: the time of {name} was over (--timeout)", "late": True}
    else:
        said = log[-1] if log else "it said nothing"
        yield {"ended": f"its process ended with code {process.returncode}: {said}"[:300]}


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:250]
