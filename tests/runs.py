"""What a tiny run needs, and recipes for it: those of the conformance kit."""

from lavintk.testing.runs import *  # noqa: F403
