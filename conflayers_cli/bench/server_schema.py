"""The results document of ``bench --server``: a load on a server that speaks OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Literal

from conflayers_cli.bench.schema import Count, Seconds, Section, Share

SCHEMA_VERSION: Final = 1


class Percentiles(Section):
    """Seconds; None where nothing was measured."""

    p50: Seconds | None
    p95: Seconds | None
    p99: Seconds | None
    max: Seconds | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """By the nearest rank."""
        ordered = sorted(values)
        if not ordered:
            return cls(p50=None, p95=None, p99=None, max=None)

        def at(share: float) -> float:
            return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]

        return cls(p50=at(0.5), p95=at(0.95), p99=at(0.99), max=ordered[-1])


class LoadFigures(Section):
    """One load.

    Attributes:
        clients: requests kept in flight (a closed loop); None: they came at ``rate``.
        rate: requests a second (an open loop, the gaps exponential); None: ``clients`` kept going.
        requests, failed: sent, and not answered in full.
        errors: how often what went wrong.
        seconds: from the first request to the last answer.
        prompt_tokens, tokens: as the server counts them.
        tokens_per_second, requests_per_second: of all together.
        time_to_first_token_s, between_chunks_s: of the streams; a chunk may be several tokens.
        per_token_s: of each answer, behind its first chunk.
        request_s: from sending to the end.
        accepted, rejected: drafted tokens, where the server reports them.
        acceptance_rate: None where it does not.
    """

    clients: Count | None
    rate: float | None
    requests: Count
    failed: Count
    errors: dict[str, Count]
    seconds: Seconds
    prompt_tokens: Count
    tokens: Count
    tokens_per_second: float
    requests_per_second: float
    time_to_first_token_s: Percentiles
    between_chunks_s: Percentiles
    per_token_s: Percentiles
    request_s: Percentiles
    accepted: Count | None
    rejected: Count | None
    acceptance_rate: Share | None


class ServerBenchDocument(Section):
    """The loads on one server, and what they were made of.

    Attributes:
        kind: tells it from a bench of this process.
        server, model: its address, and the model's name there.
        environment: of the client.
        settings: what was sent.
    """

    schema_version: Literal[1]
    kind: Literal["server-load"]
    server: str
    model: str
    environment: dict[str, str | int | None]
    settings: dict[str, Any]
    loads: list[LoadFigures]

    def as_json(self) -> dict[str, Any]:
        return self.model_dump()
