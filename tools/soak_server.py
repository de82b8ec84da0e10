"""Many streams on one server for minutes, some cancelled: nothing is lost or mixed up.

Greedy chats are sent over and over, each stream its next one once the last has ended. Every text
has to be what the model generates alone, in this process, without drafts; one that was cancelled
has to be the beginning of that. Noted are the longest gap between two pieces of a text, refusals,
and the server's resident memory in thirds of the time.

    conflayers serve --profile profiles/smollm2.yaml --dtype bfloat16 --port 8000 &
    python -m tools.soak_server --url http://127.0.0.1:8000 --pid $! --model smollm2 \
        --dtype bfloat16 --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

from conflayers_cli.engine.open_model import open_model
from conflayers_cli.generation.detokenizer import Detokenizer
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.prompts import builtin_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.tokenization import encode
from conflayers_cli.utils.files import write_json

LENGTHS = (4, 16, 48, 120)
CANCELLED = 1 / 3
MEMORY_EVERY = 2.0
"""Seconds."""


@dataclass
class Seen:
    """What the streams have seen."""

    texts: int = 0
    cancelled: int = 0
    refused: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Expected:
    """A prompt and, by how many tokens are asked for, the text."""

    prompt: str
    texts: dict[int, str]


def expected_texts(model: str, dtype: str, prompts: Sequence[str]) -> list[Expected]:
    """What the model generates alone, one token a step."""
    loaded, decoder = open_model(model, LoadOptions(dtype=dtype))
    generator = TextGenerator(decoder, loaded.tokenizer, end_tokens=loaded.end_tokens)
    found = []
    for prompt in prompts:
        ids = encode(loaded, [{"role": "user", "content": prompt}], None)
        (result,) = generator.generate([GenerationRequest(ids, max(LENGTHS))])
        texts = {}
        for length in LENGTHS:
            text = Detokenizer(loaded.tokenizer)
            for token in result.token_ids[:length]:
                text.feed(token)
            text.take()
            text.finish()
            texts[length] = text.text
        found.append(Expected(prompt, texts))
    return found


async def one(
    client: httpx.AsyncClient, expected: Expected, length: int, cancel: float | None, seen: Seen
) -> None:
    """Send a chat and compare what comes; ``cancel``: the share of the text after which to go away;
    0: at once, perhaps while it waits in the queue."""
    body = {
        "messages": [{"role": "user", "content": expected.prompt}],
        "max_tokens": length,
        "temperature": 0,
        "stream": True,
    }
    text, ended, before = "", False, time.perf_counter()
    begin, gaps = before, list[float]()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code not in (429, 503):
                    seen.lost.append(f"status {response.status_code}")
                seen.refused += 1
                await asyncio.sleep(float(response.headers.get("retry-after", 1)))
                return
            async for line in response.aiter_lines():
                if cancel is not None and len(text) >= cancel * len(expected.texts[length]):
                    break
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        seen.lost.append(str(event["error"]["message"]))
                        return
                    piece = event["choices"][0]["delta"].get("content")
                    now = time.perf_counter()
                    if piece:
                        (gaps if text else seen.first).append(now - (before if text else begin))
                        before, text = now, text + piece
    except httpx.HTTPError as error:
        seen.lost.append(f"{type(error).__name__}: {error}")
        return
    seen.gaps += gaps
    if cancel is not None and not ended:
        seen.cancelled += 1
        if not expected.texts[length].startswith(text):
            seen.wrong.append(f"{expected.prompt[:40]!r}, cancelled: {text[:80]!r}")
        return
    seen.texts += 1
    seen.tokens += length
    if not ended:
        seen.lost.append(f"{expected.prompt[:40]!r}: no end")
    elif text != expected.texts[length]:
        seen.wrong.append(f"{expected.prompt[:40]!r}, {length}: {text[:80]!r}")


async def soak(
    client: httpx.AsyncClient,
    expected: Sequence[Expected],
    *,
    streams: int,
    seconds: float,
    pid: int | None = None,
    seed: int = 0,
) -> Seen:
    """Keep so many streams going for so long."""
    seen, drawn, end = Seen(), random.Random(seed), time.perf_counter() + seconds

    async def stream() -> None:
        while time.perf_counter() < end:
            length = drawn.choice(LENGTHS)
            cancel = max(drawn.uniform(-0.2, 1), 0) if drawn.random() < CANCELLED else None
            await one(client, drawn.choice(expected), length, cancel, seen)

    async def watch() -> None:
        process = psutil.Process(pid)
        while True:
            seen.memory.append(process.memory_info().rss)
            await asyncio.sleep(MEMORY_EVERY)

    watching = asyncio.create_task(watch()) if pid else None
    await asyncio.gather(*(stream() for _ in range(streams)))
    if watching:
        watching.cancel()
    return seen


def summary(seen: Seen) -> dict[str, Any]:
    """The figures, and what went wrong."""
    found = asdict(seen)
    third = max(len(seen.memory) // 3, 1)
    thirds = [seen.memory[i : i + third] for i in range(0, 3 * third, third)] if seen.memory else []
    for name in ("gaps", "first"):
        values = sorted(found.pop(name)) or [0.0]
        found[name] = {
            "median": statistics.median(values),
            "p99": values[int(0.99 * (len(values) - 1))],
            "max": values[-1],
        }
    found["memory"] = [round(max(part) / 2**20) for part in thirds if part]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="of the server, for its memory")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="what the server runs")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    prompts = [prompt.text for prompt in builtin_prompts()[:12] if prompt.text]
    expected = expected_texts(given.model, given.dtype, prompts)

    async def run() -> Seen:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=given.url, limits=limits, timeout=900) as client:
            seconds = 60 * given.minutes
            return await soak(
                client, expected, streams=given.streams, seconds=seconds, pid=given.pid
            )

    found = {"streams": given.streams, "minutes": given.minutes, **summary(asyncio.run(run()))}
    if given.output:
        write_json(given.output, found)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 1 if found["wrong"] or found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
