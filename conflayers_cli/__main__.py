"""``python -m conflayers_cli``: the command, as torchrun starts it."""

import sys

from conflayers_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
