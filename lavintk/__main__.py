"""``python -m lavintk`` is ``lavintk``."""

import sys

from lavintk.cli import main

sys.exit(main())
