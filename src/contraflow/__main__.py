"""`python -m contraflow`."""

import sys

from contraflow.cli import main

if __name__ == "__main__":
    sys.exit(main())

__all__ = ["main"]
