"""A load on any server that speaks OpenAI's API: streams of chats, in a closed or an open loop.

In a closed loop every client sends its next request once the last is answered: a slow server is
asked less. In an open loop requests come at their rate, whatever the server does: what waits, waits
longer, as for real users.
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx2 as httpx

from conflayers_cli.bench.server_schema import (
    SCHEMA_VERSION,
    LoadFigures,
    Percentiles,
    ServerBenchDocument,
)
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompts import Prompt, as_messages, fingerprint
from conflayers_cli.utils.environment import processor_name
from conflayers_cli.version import __version__

CHAT = "chat/completions"
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class ServerLoad:
    """What is sent where.

    Attributes:
        url: the server's, with or without ``/v1``.
        prompts: sent in turns.
        requests: of each load.
        clients: loads of so many requests kept in flight.
        rates: loads of so many requests a second.
        model: its name there; None: the first that the server names.
        key: an API key.
        max_new_tokens, temperature, seed: of every answer.
        timeout: seconds of a request.
    """

    url: str
    prompts: Sequence[Prompt]
    requests: int
    clients: Sequence[int] = (1,)
    rates: Sequence[float] = ()
    model: str | None = None
    key: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    timeout: float = 600.0

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1") + "/v1/"

    def body(self, index: int, model: str) -> dict[str, Any]:
        """The request of a load's ``index``-th turn."""
        prompt = self.prompts[index % len(self.prompts)]
        return {
            "model": model,
            "messages": as_messages(prompt),
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass
class Answered:
    """What came of one request: when its chunks came, from its sending on, and its usage."""

    chunks: list[float] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, Any] | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """As the server counts them; else a chunk is taken for one."""
        if self.usage is None:
            return len(self.chunks)
        return int(self.usage.get("completion_tokens") or 0)


def measure_server(
    load: ServerLoad, on_progress: Callable[[str, float], None]
) -> ServerBenchDocument:
    """Measure the loads one after the other.

    Raises:
        InputError: the address is none.
        ConfLayersError: the server can't be reached, or answers no request.
    """
    return asyncio.run(_measure(load, on_progress))


async def _measure(
    load: ServerLoad, on_progress: Callable[[str, float], None]
) -> ServerBenchDocument:
    headers = {"Authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(load.timeout, connect=CONNECT_SECONDS)
    try:
        client = httpx.AsyncClient(
            base_url=load.base, headers=headers, limits=limits, timeout=timeout
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"server {load.url}: {error}", names=("server",)) from error
    async with client:
        model = load.model or await _first_model(client, load)
        plans = [*((clients, None) for clients in load.clients), *((None, r) for r in load.rates)]
        figures = []
        for clients, rate in plans:
            which = f"{rate:g} requests/s" if rate else f"{clients} clients"
            done = 0

            def count(which: str = which) -> None:
                nonlocal done
                done += 1
                on_progress(f"{which}, {done} of {load.requests}", done / load.requests)

            figures.append(await _run(client, load, model, clients, rate, count))
    return ServerBenchDocument(
        schema_version=SCHEMA_VERSION,
        kind="server-load",
        server=load.base,
        model=model,
        environment={
            "conflayers": __version__,
            "python": platform.python_version(),
            "processor": processor_name(),
            "platform": platform.platform(),
        },
        settings={
            "requests": load.requests,
            "prompts": len(load.prompts),
            "prompts_sha256": fingerprint(load.prompts),
            "max_new_tokens": load.max_new_tokens,
            "temperature": load.temperature,
            "seed": load.seed,
        },
        loads=figures,
    )


async def _first_model(client: httpx.AsyncClient, load: ServerLoad) -> str:
    try:
        response = await client.get("models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise ConfLayersError(f"{load.base}models: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfLayersError(
            f"{load.base}models names no model: give server_model", names=("server_model",)
        ) from error


async def _run(
    client: httpx.AsyncClient,
    load: ServerLoad,
    model: str,
    clients: int | None,
    rate: float | None,
    count: Callable[[], None],
) -> LoadFigures:
    answers: list[Answered] = []

    async def one(index: int) -> None:
        answers.append(await _ask(client, load.body(index, model)))
        count()

    begin = perf_counter()
    if rate is None:
        await _closed_loop(one, load.requests, clients or 1)
    else:
        await _open_loop(one, load.requests, rate, load.seed)
    figures = _figures(answers, perf_counter() - begin, clients, rate)
    if figures.failed == figures.requests:
        what = next(iter(figures.errors), "")
        raise ConfLayersError(f"{load.base}{CHAT}: no request was answered: {what}")
    return figures


Ask = Callable[[int], Coroutine[Any, Any, None]]


async def _closed_loop(one: Ask, requests: int, clients: int) -> None:
    turns = iter(range(requests))

    async def client() -> None:
        for index in turns:
            await one(index)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _open_loop(one: Ask, requests: int, rate: float, seed: int) -> None:
    drawn = random.Random(seed)
    async with asyncio.TaskGroup() as tasks:
        for index in range(requests):
            if index:
                await asyncio.sleep(drawn.expovariate(rate))
            tasks.create_task(one(index))


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answered:
    answer, begin = Answered(), perf_counter()
    try:
        async with client.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                answer.error = f"status {response.status_code}"
                await response.aread()
            else:
                async for line in response.aiter_lines():
                    _take(answer, line, perf_counter() - begin)
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    except ValueError:
        answer.error = "no JSON in the stream"
    answer.seconds = perf_counter() - begin
    if answer.error is None and not answer.chunks:
        answer.error = "an empty answer"
    return answer


def _take(answer: Answered, line: str, now: float) -> None:
    """Note an event of a stream."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = "an error in the stream"
        return
    answer.usage = event.get("usage") or answer.usage
    if any(choice.get("delta", {}).get("content") for choice in event.get("choices") or ()):
        answer.chunks.append(now)


def _figures(
    answers: Sequence[Answered], seconds: float, clients: int | None, rate: float | None
) -> LoadFigures:
    good = [answer for answer in answers if answer.error is None]
    usages = [answer.usage or {} for answer in good]
    details = [usage.get("completion_tokens_details") or {} for usage in usages]
    reported = [each for each in details if each.get("accepted_prediction_tokens") is not None]
    accepted = sum(each["accepted_prediction_tokens"] for each in reported)
    rejected = sum(each.get("rejected_prediction_tokens") or 0 for each in reported)
    tokens = sum(answer.tokens for answer in good)
    gaps = [
        after - before
        for answer in good
        for before, after in zip(answer.chunks, answer.chunks[1:], strict=False)
    ]
    per_token = [
        (answer.chunks[-1] - answer.chunks[0]) / (answer.tokens - 1)
        for answer in good
        if answer.tokens > 1
    ]
    return LoadFigures(
        clients=clients,
        rate=rate,
        requests=len(answers),
        failed=len(answers) - len(good),
        errors=dict(Counter(answer.error for answer in answers if answer.error)),
        seconds=seconds,
        prompt_tokens=sum(int(usage.get("prompt_tokens") or 0) for usage in usages),
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        requests_per_second=len(good) / seconds,
        time_to_first_token_s=Percentiles.of([answer.chunks[0] for answer in good]),
        between_chunks_s=Percentiles.of(gaps),
        per_token_s=Percentiles.of(per_token),
        request_s=Percentiles.of([answer.seconds for answer in good]),
        accepted=accepted if reported else None,
        rejected=rejected if reported else None,
        acceptance_rate=accepted / (accepted + rejected) if accepted + rejected else None,
    )
