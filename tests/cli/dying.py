"""The command line in processes that die once so much was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from conflayers_cli.cli.main import main
from conflayers_cli.search.memo import Memo

DIES_AFTER = "CONFLAYERS_TEST_DIES_AFTER"


def _die_after(entries: int) -> None:
    cached = Memo.cached

    def counted(self: Memo, key: str, compute: Callable[[], Any]) -> Any:
        value = cached(self, key, compute)
        if len(self._entries) == entries:
            os._exit(9)
        return value

    Memo.cached = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    _die_after(int(os.environ[DIES_AFTER]))
    sys.exit(main())
