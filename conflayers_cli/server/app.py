"""The application: OpenAI's endpoints, the server's state, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from conflayers_cli.server.answers import Answers, Mailbox
from conflayers_cli.server.bodies import Bodies
from conflayers_cli.server.encoding import Encoder
from conflayers_cli.server.errors import ApiError, log_failure, server_failed
from conflayers_cli.server.guards import BodyReader, ClientDisconnect, KeyRing
from conflayers_cli.server.logprobs import TokenNames
from conflayers_cli.server.metrics import CONTENT_TYPE_LATEST, Metrics
from conflayers_cli.server.openapi import document
from conflayers_cli.server.options import LOOPBACK, ServerOptions
from conflayers_cli.server.scheduler import Scheduler
from conflayers_cli.server.schema import ChatRequest, CompletionRequest

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
KEEP_ALIVE = 15.0
"""Seconds without a token after which a stream's client is told that it is still being served."""
CLIENT_GONE = 499
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, eq=False)
class Service:
    """What the endpoints work with.

    Attributes:
        model, created: the model's name to clients, and since when it is served.
        aliases: other names that are taken for it.
        encoder, scheduler, mailbox, metrics, options: see their classes.
        keys: who may ask.
    """

    model: str
    aliases: frozenset[str]
    created: int
    encoder: Encoder
    scheduler: Scheduler
    mailbox: Mailbox
    metrics: Metrics
    options: ServerOptions
    keys: KeyRing
    names: TokenNames
    end_tokens: frozenset[int]

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model and name not in self.aliases:
            raise ApiError(
                404, f"there is no such model; {self.model} is", param="model",
                code="model_not_found",
            )  # fmt: skip


class _Endpoints:
    """The handlers, one for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._bodies = BodyReader(service.options.max_body, service.options.read_timeout)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest)

    async def _complete(
        self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        service, options = self._service, self._service.options
        owner = service.keys.owner(request)
        deadline = request.state.deadline = monotonic() + options.timeout
        asked: ChatRequest | CompletionRequest = await self._bodies.read(request, kind)
        service.check_model(asked.model)
        count = (asked.n or 1) * asked.num_prompts
        if count > options.max_texts:
            raise ApiError(
                400, f"n: {options.max_texts} texts at most are decoded for a request", param="n"
            )
        bodies = Bodies(asked, service.model, service.names, service.end_tokens)
        with service.scheduler.admitted(count, owner):
            loop = asyncio.get_running_loop()
            requests = await loop.run_in_executor(
                self._encoding, service.encoder.encode, asked, owner
            )
            answers = Answers(
                service.scheduler, service.mailbox, requests, service.metrics, deadline
            )
        if asked.stream:
            return _EventStream(answers, bodies)
        return await _whole(request, answers, bodies)

    async def models(self, request: Request) -> Response:
        self._service.keys.owner(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.keys.owner(request)
        self._service.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "conflayers",
            "max_model_len": service.encoder.context,
        }

    async def health(self, request: Request) -> Response:
        alive = self._service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        self._service.keys.owner(request)
        return Response(
            self._service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def page(self, request: Request) -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    def close(self) -> None:
        self._encoding.shutdown(wait=False, cancel_futures=True)


async def _whole(request: Request, answers: Answers, bodies: Bodies) -> Response:
    """The response once all texts have ended; they are ended when the client goes away."""

    async def collect() -> None:
        async for index, response in answers:
            bodies.add(index, response)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting, watching = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait((collecting, watching), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=CLIENT_GONE)
        collecting.result()
    finally:
        answers.cancel()
        for task in (collecting, watching):
            task.cancel()
    return JSONResponse(bodies.whole())


class _EventStream(StreamingResponse):
    """Server-sent events of the texts; they are ended when the client goes away."""

    def __init__(self, answers: Answers, bodies: Bodies) -> None:
        self._answers = answers
        super().__init__(
            _events(answers, bodies),
            media_type="text/event-stream; charset=utf-8",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _events(answers: Answers, bodies: Bodies) -> AsyncIterator[str]:
    for chunk in bodies.first_chunks():
        yield _event(chunk)
    try:
        while not answers.over:
            if (found := await answers.next(KEEP_ALIVE)) is None:
                yield ": still here\n\n"
                continue
            index, response = found
            part = bodies.add(index, response)
            if bodies.says_something(part):
                yield _event(bodies.chunk(part))
            if response.result is not None:
                yield _event(bodies.last_chunk(index))
    except ApiError as error:  # the status is sent already
        yield _event(error.body)
        return
    except Exception as error:  # noqa: BLE001 - logged, and told to the client
        log_failure(logger, "a stream failed", error)
        yield _event(server_failed().body)
        return
    if (last := bodies.usage_chunk()) is not None:
        yield _event(last)
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def build_app(service: Service) -> Starlette:
    """The application; its engine runs from its beginning to its end."""
    endpoints = _Endpoints(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.metrics.watch(service.scheduler)
        service.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.scheduler.stop)
            endpoints.close()

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        async def counted(request: Request) -> Response:
            try:
                response = await handler(request)
            except ApiError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            except HTTPException:
                raise
            except Exception as error:  # noqa: BLE001 - logged, and told to the client
                log_failure(logger, path, error)
                response = _error_response(server_failed())
            service.metrics.requests.labels(path, response.status_code).inc()
            response.headers.update(HEADERS)
            return response

        return Route(path, counted, methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", endpoints.chat, "POST"),
            route("/v1/completions", endpoints.completions, "POST"),
            route("/v1/models", endpoints.models),
            route("/v1/models/{name:path}", endpoints.model),
            route("/health", endpoints.health),
            route("/metrics", endpoints.metrics),
            route("/openapi.json", endpoints.openapi),
            route("/", endpoints.page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=_middleware(service.options),
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
        lifespan=lifespan,
    )


def _middleware(options: ServerOptions) -> list[Middleware]:
    made = []
    if options.is_local:
        # A page of another site can't reach the server by a name of its own (DNS rebinding).
        hosts = [*LOOPBACK, "[::1]"]
        made.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False))
    if options.cors_origins:
        made.append(
            Middleware(
                CORSMiddleware,
                allow_origins=options.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        )
    return made


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: an unknown path, another method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    detail = getattr(error, "detail", "") or "error"
    body = ApiError(status, str(detail), code=str(detail).lower().replace(" ", "_")).body
    return JSONResponse(body, status, headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log_failure(logger, "a request failed", error)
    return _error_response(server_failed())
