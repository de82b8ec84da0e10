"""A tiny model on disk, with a tokenizer of bytes, and profiles for it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from conflayers_cli.cli.main import main
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.profile.schema import DraftSettings, ModelFingerprint, Profile, SkipSection
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.processes import Process

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Result:
    """What a run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as exactly one JSON document."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]


def byte_tokenizer(template: str | None) -> Any:
    """A token for each byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = template
    return fast


def save_model(folder: Path, *, template: str | None = TEMPLATE, **more: Any) -> Path:
    """A random Llama of five layers with its tokenizer; the same on every run."""
    sizes = {**tiny.LLAMA_LIKE, "vocab_size": 257, "eos_token_id": 256, "pad_token_id": None}
    sizes["max_position_embeddings"] = 4096
    model = tiny.build(hf.LlamaConfig(**{**sizes, **more}))
    model.generation_config = hf.GenerationConfig(eos_token_id=256)
    model.save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder


def save_profile(
    path: Path,
    model: Path,
    plan: SkipPlan | None = None,
    max_tokens: int = 4,
    lookahead: bool | None = False,
    **changes: Any,
) -> Path:
    """A profile for a saved model; ``changes`` falsify its fingerprint.

    With lookahead false drafts are as long as it says, whatever passes cost: on a tiny model
    nothing ever pays.
    """
    values = {
        "name": str(model),
        **config_fingerprint(hf.AutoConfig.from_pretrained(model)),
        **changes,
    }
    Profile(
        model=ModelFingerprint.model_validate(values),
        skip=SkipSection.of(SkipPlan.of_layers([2]) if plan is None else plan),
        draft=DraftSettings(
            max_tokens=max_tokens,
            stop_probability=0.0,
            by=None if lookahead is None else "skip",
            lookahead=lookahead,
        ),
    ).save(path)
    return path


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that are measured are kept in a folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFLAYERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return save_profile(tmp_path_factory.mktemp("profiles") / "tiny.yaml", model)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command line in this process, in an empty folder, in float32 on the CPU."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: object, stdin: str | bytes | None = None) -> Result:
        with monkeypatch.context() as patch:
            if stdin is not None:
                data = stdin.encode() if isinstance(stdin, str) else stdin
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            capsys.readouterr()
            code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return go


def start(arguments: Sequence[object], **streams: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "conflayers_cli.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # A job that a shell put into the background ignores SIGINT, and its children would, too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, preexec_fn=heed, **streams)


def finished(process: Process) -> Result:
    """Wait for a process that writes to pipes."""
    out, err = process.communicate(timeout=120)
    return Result(process.wait(), (out or b"").decode(), (err or b"").decode())


def write_prompts(path: Path, *prompts: str) -> Path:
    """A prompt file with ids and categories."""
    lines = (
        json.dumps({"id": f"p{i}", "category": f"c{i % 2}", "prompt": text})
        for i, text in enumerate(prompts)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def quick_search(iterations: int, tokens: int, refine_limit: int) -> tuple[object, ...]:
    """Options of a quick calibration by ConfLayers' method."""
    search = ("--strategy", "conflayers", "--search-interval", 4, "--max-iterations", iterations)
    return (*search, "-n", tokens, "--refine-limit", refine_limit)
