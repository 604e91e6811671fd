"""How many shapes of micro-batches are recorded, and the line that tells of those that are not."""

from __future__ import annotations

from collections.abc import Callable


class ShapeLimit:
    """Admits so many shapes, and says once that there were more.

    :param most: shapes that are recorded. :param say: takes the line; None: nobody is told.
    """

    def __init__(self, most: int, say: Callable[[str], None] | None) -> None:
        self._most, self._say = most, say

    def admits(self, recorded: int) -> bool:
        """Whether one more shape may be recorded beside those that are."""
        if recorded < self._most:
            return True
        if self._say is not None:
            self._say(
                f"note: {self._most} shapes of micro-batches are recorded as CUDA graphs, and no more will be; "
                "micro-batches of other shapes run without, more slowly"
            )
            self._say = None
        return False
