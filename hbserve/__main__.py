"""``python -m hbserve``: the same as the command ``hbserve``."""

import sys

from hbserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
