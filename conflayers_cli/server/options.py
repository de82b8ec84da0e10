"""A server's limits: plain values that need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conflayers_cli.errors import InputError

MIN_DRAFT_TEXTS = 1024
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and what it takes at most.

    Attributes:
        host, port: where; port 0: a free one.
        served_name: the model's name to clients; None: the last part of its own.
        api_keys: a file of keys, one a line; None: nobody is asked for one.
        cors_origins: sites whose pages may use the server; None: none but its own.
        batch_size: texts decoded at once.
        queue_size: texts that may wait, beside these.
        context: positions of each text, prompt and answer together; None: the model's, but no more
            than `DEFAULT_CONTEXT`.
        max_new_tokens: the most tokens of an answer; None: what the context leaves.
        max_texts: texts of one request, its prompts times ``n``.
        max_body: bytes of a request.
        timeout: seconds from a request's arrival to its end.
        read_timeout: seconds in which a request must have arrived, and in which a client must
            take what it is sent.
        drain: seconds that running requests get after SIGTERM; infinite: as long as they take.
        prefill_chunk: prompt tokens read at most between two steps of the others.
        prefix_cache: MiB of keys and values kept of earlier texts; 0: none.
        draft_texts: tokens kept of each API key's earlier texts, to draft from; 0: none.

    Raises:
        InputError: a value is outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    api_keys: Path | None = None
    cors_origins: list[str] | None = None
    batch_size: int = 8
    queue_size: int = 128
    context: int | None = None
    max_new_tokens: int | None = None
    max_texts: int = 16
    max_body: int = 8 << 20
    timeout: float = 600.0
    read_timeout: float = 30.0
    drain: float = 60.0
    prefill_chunk: int = 256
    prefix_cache: int = 512
    draft_texts: int = 1 << 16

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port {self.port}: allowed is 0 to 65535", names=("port",))
        for name in ("batch_size", "max_texts", "max_body", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: at least 1", names=(name,))
        for name in ("timeout", "read_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)}: over 0", names=(name,))
        if 0 < self.draft_texts < MIN_DRAFT_TEXTS or self.draft_texts < 0:
            raise InputError(
                f"draft_texts {self.draft_texts}: 0, or at least {MIN_DRAFT_TEXTS:,}",
                names=("draft_texts",),
            )
        if not self.drain >= 0:
            raise InputError(f"drain {self.drain}: at least 0", names=("drain",))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


DEFAULT_CONTEXT = 8192
"""Positions of a text, where the model would take more: memory is set aside for all at once."""
