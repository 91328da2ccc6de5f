"""``python -m avmm.cli``: the same as ``avmm``."""

import sys

from avmm.cli import main

sys.exit(main())
