"""The queue, its bounds, and what ends texts before their ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.server.errors import ApiError
from conflayers_cli.server.scheduler import Event, Scheduler, Ticket
from tests import tiny

LONG = 200
"""Tokens of texts that are not to end by themselves while a test looks at them."""


def slowly(token: int) -> bool:
    sleep(0.002)
    return False


class Client:
    """Submits texts to a scheduler and waits for what comes of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.events: dict[str, list[Event]] = {}
        self.order: list[str] = []  # of ends
        self.log: list[str] = []  # of all events
        self.arrived = threading.Condition()

    def submit(self, name: str, tokens: int = 5, owner: str = "", **more: Any) -> Ticket:
        request = GenerationRequest(
            tiny.prompt(6, len(self.events)),
            tokens,
            id=name,
            owner=owner,
            on_token=slowly if tokens >= LONG else None,
        )
        return self.submit_request(request, **more)

    def submit_request(self, request: GenerationRequest, **more: Any) -> Ticket:
        ticket = Ticket(request, partial(self._deliver, request.id), **more)
        self.events[request.id] = []
        with self.scheduler.admitted(1, request.owner):
            self.scheduler.submit([ticket])
        return ticket

    def _deliver(self, name: str, event: Event) -> None:
        with self.arrived:
            self.events[name].append(event)
            self.log.append(name)
            if self._is_last(event):
                self.order.append(name)
            self.arrived.notify_all()

    @staticmethod
    def _is_last(event: Event) -> bool:
        return isinstance(event, ApiError) or event.result is not None

    def wait(self, done: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(done, timeout=30)

    def outcome(self, name: str) -> Any:
        """The tokens of a text, or the error that ended it."""
        self.wait(lambda: name in self.order)
        last = self.events[name][-1]
        if isinstance(last, ApiError):
            return last
        assert last.result is not None
        return list(last.result.token_ids)


@pytest.fixture
def start() -> Iterator[Callable[..., Client]]:
    """Makes schedulers that run until the test is over."""
    made: list[Scheduler] = []

    def make(slots: int = 2, max_waiting: int = 10, decoder: Any = None, **more: Any) -> Client:
        generator = TextGenerator(
            decoder or tiny.decoder("llama"),
            batch_size=slots,
            new_batch=partial(Batch, chunk=8, reserve=256),
        )
        # A step takes a while: texts are not over before a test has looked at them.
        more.setdefault("on_step", lambda *_: sleep(0.005))
        made.append(Scheduler(generator, slots=slots, max_waiting=max_waiting, **more))
        made[-1].start()
        return Client(made[-1])

    yield make
    for scheduler in made:
        scheduler.stop()


def test_texts_are_those_of_a_plain_decoding(start: Callable[..., Client]) -> None:
    client = start(slots=3)
    for i in range(8):
        client.submit(f"{i}", tokens=4 + 3 * i)

    for i in range(8):
        expected = GenerationRequest(tiny.prompt(6, i), 4 + 3 * i)
        (alone,) = TextGenerator(tiny.decoder("llama")).generate([expected])
        assert client.outcome(f"{i}") == list(alone.token_ids)


def test_a_full_queue_says_when_to_come_again(start: Callable[..., Client]) -> None:
    client = start(slots=1, max_waiting=2)
    tickets = [client.submit("long", tokens=240)]
    client.wait(lambda: bool(client.events["long"]))
    tickets += [client.submit(f"{i}") for i in range(2)]

    with pytest.raises(ApiError) as caught:
        client.submit("one more")

    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert int(caught.value.headers["Retry-After"]) >= 1
    client.scheduler.cancel(tickets[:1])
    assert client.outcome("0") and client.outcome("1")
    client.submit("again")
    assert client.outcome("again")


def test_what_is_cancelled_frees_its_place_within_a_step(start: Callable[..., Client]) -> None:
    client = start(slots=1)
    long = client.submit("long", tokens=240)
    waiting = client.submit("waiting", tokens=240)
    client.submit("next", tokens=3)
    client.wait(lambda: bool(client.events["long"]))

    client.scheduler.cancel([long, waiting])

    assert len(client.outcome("next")) == 3
    assert "long" not in client.order
    tokens = len(client.events["long"])
    sleep(0.05)
    assert len(client.events["long"]) == tokens < 200
    assert client.events["waiting"] == []
    client.wait(lambda: client.scheduler.num_running == 0)


def test_owners_take_turns(start: Callable[..., Client]) -> None:
    client = start(slots=1, max_waiting=20)
    first = client.submit("first", tokens=200, owner="a")
    client.wait(lambda: bool(client.events["first"]))
    for i in range(4):
        client.submit(f"a{i}", owner="a")
    client.submit("b0", owner="b")
    client.scheduler.cancel([first])

    client.wait(lambda: len(client.order) == 5)

    assert client.order.index("b0") <= 1


def test_one_owner_leaves_room_for_others(start: Callable[..., Client]) -> None:
    client = start(slots=1, max_waiting=7, shared=True)

    def taken(owner: str) -> int:
        """How many texts of an owner are taken."""
        for count in range(9):
            try:
                client.submit(f"{owner}{count}", tokens=240, owner=owner)
            except ApiError as error:
                assert (error.status, error.code) == (429, "queue_full")
                return count
        return 9

    assert [taken(owner) for owner in "abcd"] == [4, 2, 1, 1]
    with pytest.raises(ApiError, match="the queue is full"), client.scheduler.admitted(1, "e"):
        pass


def test_an_owner_alone_has_the_whole_queue(start: Callable[..., Client]) -> None:
    client = start(slots=1, max_waiting=3)
    with client.scheduler.admitted(4), pytest.raises(ApiError), client.scheduler.admitted(1):
        pass
    with client.scheduler.admitted(4):
        pass


def test_what_can_never_be_taken_is_refused(start: Callable[..., Client]) -> None:
    client = start(slots=1, max_waiting=3)
    with pytest.raises(ApiError) as caught, client.scheduler.admitted(5):
        pass
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_a_request_has_its_time(start: Callable[..., Client]) -> None:
    client = start(slots=1, on_step=lambda *_: sleep(0.01))
    client.submit("late", tokens=240, deadline=monotonic() + 1)
    client.submit("waiting", tokens=240, deadline=monotonic() + 0.02)

    for name in ("late", "waiting"):
        error = client.outcome(name)
        assert error.status == 504 and error.code == "timeout"


def test_one_texts_broken_numbers_end_that_text_alone(start: Callable[..., Client]) -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    prompt = tiny.prompt(12)
    requests = [
        GenerationRequest(prompt, 60, id="good"),
        GenerationRequest(prompt[:4], 20, id="behind"),
    ]
    expected = [result.token_ids for result in TextGenerator(decoder).generate(requests)]
    unused = min({*range(tiny.VOCABULARY)} - {*prompt, *expected[0], *expected[1]})
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight[unused] = float("nan")
    client = start(slots=2, decoder=decoder)
    client.submit_request(requests[0])
    client.submit_request(GenerationRequest([5, unused, 7], 5, id="bad"))
    client.submit_request(requests[1])

    bad = client.outcome("bad")

    assert bad.status == 500 and "NaN" in bad.message
    for request, tokens in zip(requests, expected, strict=True):
        assert client.outcome(request.id) == list(tokens)


def test_a_failing_engine_ends_what_runs_and_goes_on(
    start: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    client.submit("one", tokens=240)
    client.wait(lambda: bool(client.events["one"]))
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        monkeypatch.undo()
        raise RuntimeError("out of order: secret prompt")

    monkeypatch.setattr(TextGenerator, "step", fail)
    error = client.outcome("one")

    assert failed.is_set()
    assert error.status == 500 and "secret" not in error.message
    client.submit("two", tokens=3)
    assert len(client.outcome("two")) == 3


def test_an_ending_server_takes_nothing_and_tells_everybody(start: Callable[..., Client]) -> None:
    client = start(slots=1)
    client.submit("running", tokens=240)
    client.submit("waiting", tokens=240)
    client.wait(lambda: bool(client.events["running"]))

    client.scheduler.stop()

    assert {client.outcome(name).status for name in ("running", "waiting")} == {503}
    assert not client.scheduler.alive
    with pytest.raises(ApiError, match="ending"):
        client.submit("late")


def test_a_long_prompt_does_not_stop_the_others(start: Callable[..., Client]) -> None:
    client = start(slots=2)
    client.submit("stream", tokens=200)
    client.wait(lambda: bool(client.events["stream"]))
    client.submit_request(GenerationRequest(tiny.prompt(200), 5, id="long"))
    submitted = len(client.log)

    assert len(client.outcome("long")) == 5
    # It is read in 25 chunks of 8 tokens, a step of the other text between two of them.
    between = client.log.index("long") - submitted
    assert 15 <= between <= 40
    assert len(client.outcome("stream")) == 200
