"""The command line in processes that die once the journal has so many entries."""

from __future__ import annotations

import os
import sys

from conflayers_cli.cli.main import main
from conflayers_cli.search.record import Record

DIES_AFTER = "CONFLAYERS_TEST_DIES_AFTER"


def _die_after(entries: int) -> None:
    commit = Record.commit

    def committed(self: Record) -> None:
        commit(self)
        if self._kept == entries:
            os._exit(9)

    Record.commit = committed  # type: ignore[method-assign]


if __name__ == "__main__":
    _die_after(int(os.environ[DIES_AFTER]))
    sys.exit(main())
