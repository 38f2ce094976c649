"""`python -m drive` is the command `drive`."""

import sys

from .cli import main

sys.exit(main())
