"""A tiny model served in this process, and what it answers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import transformers as hf

from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.response import GenerationResult
from conflayers_cli.models.loaded_model import LoadedModel, wrap_model
from conflayers_cli.models.tokenization import encode
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from tests import tiny
from tests.cli.conftest import TEMPLATE, byte_tokenizer

if TYPE_CHECKING:
    from conflayers_cli.server.app import Service

if find_spec("starlette") is None or find_spec("prometheus_client") is None:
    collect_ignore_glob = ["test_*.py"]

CONTEXT = 512
GREEDY = {"temperature": 0}


@cache
def tiny_model() -> tuple[LoadedModel, Decoder]:
    """A random Llama of five layers, its tokenizer a byte a token."""
    sizes = {**tiny.LLAMA_LIKE, "vocab_size": 257, "eos_token_id": 256, "pad_token_id": None}
    model = tiny.build(hf.LlamaConfig(**{**sizes, "max_position_embeddings": CONTEXT}))
    model.generation_config = hf.GenerationConfig(eos_token_id=256)
    loaded = wrap_model(model, byte_tokenizer(TEMPLATE), "models/tiny", "as it is")
    return loaded, Decoder(model)


def drafting(decoder: Decoder) -> MixedProposer:
    """Drafts by skipping and n-grams, as if they cost next to nothing."""
    verify = {width: 1.0 + 0.01 * (width - 1) for width in (1, 2, 64)}
    passes = PassCosts(verify, 0.1, 0.0, 0.0, 64)
    costs = CostTable(dict.fromkeys((1, 2, 4, 8), passes), tiny.DEPTH)
    return MixedProposer(decoder, SkipPlan.of_layers([2]), costs, prior=0.9)


@dataclass
class Served:
    """A server in this process and a client of it; without ``keys`` nobody is asked for one."""

    client: Any
    service: Service

    def chat(self, text: str, **more: Any) -> Any:
        """The response to a chat of one message."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}
        return self.client.post("/v1/chat/completions", json=body)

    def answer(self, text: str, **more: Any) -> str:
        response = self.chat(text, **{**GREEDY, **more})
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content


def alone(prompt: str, tokens: int = 12, *, chat: bool = True, **more: Any) -> GenerationResult:
    """What the model generates by itself, one token a step."""
    loaded, decoder = tiny_model()
    messages = [{"role": "user", "content": prompt}] if chat else None
    ids = encode(loaded, messages, None if chat else prompt)
    request = GenerationRequest(
        ids, tokens, **{"sampling": SamplingParams(), "continues": not chat, **more}
    )
    generator = TextGenerator(decoder, loaded.tokenizer, end_tokens=loaded.end_tokens)
    (result,) = generator.generate([request])
    return result


@dataclass
class Serve:
    """Makes servers, which end with the test."""

    stack: ExitStack = field(default_factory=ExitStack)

    def __call__(self, *, drafts: bool = True, **options: Any) -> Served:
        from starlette.testclient import TestClient

        from conflayers_cli.server.app import build_app
        from conflayers_cli.server.options import ServerOptions
        from conflayers_cli.server.run import build_service

        loaded, decoder = tiny_model()
        chosen = ServerOptions(**{"batch_size": 4, "context": CONTEXT, **options})
        service = build_service(loaded, decoder, drafting(decoder) if drafts else None, chosen)
        client = TestClient(build_app(service), base_url="http://localhost")
        return Served(self.stack.enter_context(client), service)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    make = Serve()
    with make.stack:
        yield make


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server for tests that leave nothing behind."""
    make = Serve()
    with make.stack:
        yield make()
