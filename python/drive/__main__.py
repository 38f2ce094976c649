"""`python -m drive` is the command `drive`."""

import sys

from .cli import main

if __name__ == "__main__":  # also imported, by processes that share a training
    sys.exit(main())
