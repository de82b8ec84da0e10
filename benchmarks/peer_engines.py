"""The engines that are compared, each behind the same few calls; run by :mod:`.peer_worker`.

Every one gets the same token ids, chooses greedily and stops at the same end tokens. Libraries are
imported when an engine is made, weights are read by ``load``, so that memory can be told apart.
"""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
LLAMA_LOOKUP, OPENVINO_LOOKUP = 2, 5
"""Tokens that prompt lookup drafts: for llama.cpp what measured best, else the documented one."""


def make_engine(spec: Answer) -> Any:
    """The engine of a worker: ``engine`` names it; the rest are its arguments."""
    kinds = {
        "conflayers": Conflayers,
        "llama.cpp": LlamaCpp,
        "openvino": OpenVino,
        "transformers": Transformers,
    }
    arguments = dict(spec)
    return kinds[arguments.pop("engine")](**arguments)


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def _generated(
    tokens: Sequence[int], begin: float, first: float, end: float, **more: Any
) -> Answer:
    """The answer to ``generate``: output with what ended it; seconds to the first token, and of the
    others."""
    return {"tokens": list(tokens), "first": first - begin, "rest": end - first, **more}


def random_tokens(count: int, vocabulary: int) -> list[int]:
    """Tokens of a pass, always the same."""
    chance = random.Random(count)
    return [chance.randrange(vocabulary) for _ in range(count)]


class Conflayers:
    """This engine. ``quantize``: as the command line's; ``profile``: who drafts, None: nobody may.

    A folder with ``planting.json`` (see :mod:`.peer_models`) has a profile that is known.
    """

    def __init__(
        self, model: str, threads: int, profile: str | None, quantize: str | None = None
    ) -> None:
        import torch

        from benchmarks import common

        torch.set_num_threads(threads)
        self._common, self._model, self._profile, self._quantize = common, model, profile, quantize

    @property
    def versions(self) -> dict[str, str]:
        return {**_versions("torch", "transformers"), "kernels": self._decoder.kernels}

    def load(self) -> None:
        from benchmarks.peer_models import known_profile
        from conflayers_cli.engine.open_model import open_model
        from conflayers_cli.models.load_options import LoadOptions
        from conflayers_cli.profile.schema import Profile

        options = LoadOptions(device="cpu", dtype="bfloat16", quantize=self._quantize)
        loaded, self._decoder = open_model(self._model, options)
        profile = known_profile(loaded) if Path(self._model).is_dir() else None
        if self._profile:
            profile = Profile.load(Path(self._profile))
        self._subject = self._common.Subject(loaded, self._decoder, profile)
        self._plan = profile.plan if profile else None
        self._proposer: Any = None

    def generate(
        self, prompt: list[int], budget: int, ends: list[int], drafts: bool = False
    ) -> Answer:
        """Decode a prompt, plainly or with drafts."""
        from conflayers_cli.bench.systems import BenchPrompt, EngineSystem
        from conflayers_cli.sampling_params import SamplingParams

        if drafts and self._proposer is None:
            self._proposer = self._common.make_proposer(self._subject, self._subject.profile)
        proposer = self._proposer if drafts else None
        system = EngineSystem("", self._decoder, proposer, SamplingParams(), frozenset(ends))
        begin = time.perf_counter()
        (run,) = system.run([BenchPrompt("", None, tuple(prompt), budget)])
        end, stats = time.perf_counter(), run.stats
        counts = {"drafted": stats.drafted, "accepted": stats.accepted, "steps": stats.steps}
        # what is neither the prompt's pass nor a step counts as decoding
        return _generated(run.tokens, begin, begin + stats.prefill_seconds, end, **counts)

    def fill(self, context: int) -> Answer:
        """Get ready for passes behind so many tokens."""
        import torch

        self._context = context
        self._cache = self._decoder.new_cache(context + 64)
        text = random_tokens(context, self._decoder.vocabulary)
        self._decoder.prefill(torch.tensor([text]), self._cache)
        return {}

    def passes(self, width: int, count: int, draft: bool = False, own: bool = False) -> Answer:
        """Seconds of passes over so many tokens, greedy choice included.

        ``draft``: with all layers in four bits; ``own``: as the profile drafts.
        """
        from benchmarks.step_costs import run_engine
        from conflayers_cli.skip_plan import SkipPlan

        plan = SkipPlan(weights="int4") if draft else SkipPlan()
        if own and self._plan is not None:
            plan = self._plan
        run = partial(run_engine, self._decoder, self._cache, plan, self._context, width)
        return {"seconds": [run() for _ in range(count)]}

    def bandwidth(self, count: int, size: int = 256 << 20) -> Answer:
        """GB/s of plain readings of memory, by as many threads as passes have."""
        import torch

        from conflayers_cli.kernels.native_library import read_memory, usable_threads

        memory, found = torch.ones(size, dtype=torch.uint8), []
        for _ in range(count + 1):
            begin = time.perf_counter()
            read_memory(memory, usable_threads())
            found.append(size / (time.perf_counter() - begin) / 1e9)
        return {"gigabytes_per_second": found[1:]}


class LlamaCpp:
    """llama.cpp by llama-cpp-python, from a GGUF file.

    Plain decoding calls ``llama_decode`` and takes the highest of the logits, without the sampling
    of its Python class, which takes longer. ``lookup``: prompt lookup, by that class.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        context: int,
        lookup: bool = False,
        flash: bool = False,
    ) -> None:
        import llama_cpp
        import numpy as np

        self._lib, self._np = llama_cpp, np
        self._model, self._threads, self._length = model, threads, context
        self._lookup, self._flash = lookup, flash

    @property
    def versions(self) -> dict[str, str]:
        return _versions("llama-cpp-python")

    def load(self) -> None:
        drafts: Any = None
        if self._lookup:
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            drafts = LlamaPromptLookupDecoding(num_pred_tokens=LLAMA_LOOKUP)
        self._llama = self._lib.Llama(
            self._model,
            n_ctx=self._length,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            logits_all=self._lookup,
            draft_model=drafts,
            flash_attn=self._flash,
            verbose=False,
        )
        self._context = self._llama.ctx
        self._vocabulary = self._llama.n_vocab()
        self._batch = self._lib.llama_batch_init(self._llama.n_batch, 0, 1)

    def _decode(self, tokens: Sequence[int], position: int, every: bool = False) -> Any:
        """A pass; logits of the last token (``every``: of all, the last one's given)."""
        batch, chunk = self._batch, self._llama.n_batch
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, position + begin + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or begin + i == len(tokens) - 1
            if failed := self._lib.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {failed}")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return self._np.ctypeslib.as_array(logits, shape=(self._vocabulary,))

    def _forget(self, position: int) -> None:
        """Drop the cache from a position on."""
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, 0, position, -1)

    def generate(self, prompt: list[int], budget: int, ends: list[int]) -> Answer:
        """Decode a prompt."""
        if self._lookup:
            return self._generate_by_class(prompt, budget, ends)
        self._forget(0)
        begin = time.perf_counter()
        tokens = [int(self._decode(prompt, 0).argmax())]
        first = time.perf_counter()
        while len(tokens) < budget and tokens[-1] not in ends:
            position = len(prompt) + len(tokens) - 1
            tokens.append(int(self._decode(tokens[-1:], position).argmax()))
        return _generated(tokens, begin, first, time.perf_counter())

    def _generate_by_class(self, prompt: list[int], budget: int, ends: list[int]) -> Answer:
        self._llama.reset()  # else it goes on behind what an earlier prompt shares with this one
        tokens: list[int] = []
        begin = first = time.perf_counter()
        for token in self._llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == budget or tokens[-1] in ends:
                break
        return _generated(tokens, begin, first, time.perf_counter())

    def fill(self, context: int) -> Answer:
        """Get ready for passes behind so many tokens."""
        self._filled = context
        self._forget(0)
        self._decode(random_tokens(context, self._vocabulary), 0)
        return {}

    def passes(self, width: int, count: int) -> Answer:
        """Seconds of passes over so many tokens, without choosing from the logits."""
        tokens, found = random_tokens(width, self._vocabulary), []
        for _ in range(count):
            self._forget(self._filled)
            begin = time.perf_counter()
            self._decode(tokens, self._filled, every=True)
            found.append(time.perf_counter() - begin)
        return {"seconds": found}


class OpenVino:
    """OpenVINO GenAI's pipeline, from an exported folder."""

    def __init__(self, model: str, threads: int, lookup: bool = False) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self._np, self._tensor, self._lib = np, openvino.Tensor, openvino_genai
        self._model, self._threads, self._lookup = model, threads, lookup

    @property
    def versions(self) -> dict[str, str]:
        return _versions("openvino", "openvino-genai")

    def load(self) -> None:
        settings: Answer = {
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "bf16",
        }
        if self._lookup:
            settings["prompt_lookup"] = True
        self._pipeline = self._lib.LLMPipeline(self._model, "CPU", **settings)

    def generate(self, prompt: list[int], budget: int, ends: list[int]) -> Answer:
        """Decode a prompt."""
        config = self._lib.GenerationConfig()
        config.max_new_tokens, config.do_sample = budget, False
        config.ignore_eos = not ends
        if ends:
            config.set_eos_token_id(ends[0])
            config.stop_token_ids = set(ends)
        if self._lookup:
            config.num_assistant_tokens, config.max_ngram_size = OPENVINO_LOOKUP, 3
        given = self._np.array([prompt], dtype=self._np.int64)
        mask = self._np.ones_like(given)
        inputs = self._lib.TokenizedInputs(self._tensor(given), self._tensor(mask))
        begin = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        end = time.perf_counter()
        first = begin + result.perf_metrics.get_ttft().mean / 1000
        return _generated([int(token) for token in result.tokens[0]], begin, first, end)


class Transformers:
    """transformers' ``generate`` in bfloat16."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._lib, self._path = torch, transformers, model

    @property
    def versions(self) -> dict[str, str]:
        return _versions("torch", "transformers")

    def load(self) -> None:
        cls = self._lib.AutoModelForCausalLM
        self._model = cls.from_pretrained(self._path, dtype=self._torch.bfloat16).eval()
        self._model.generation_config = self._lib.GenerationConfig()

    def generate(self, prompt: list[int], budget: int, ends: list[int]) -> Answer:
        """Decode a prompt."""
        torch, times = self._torch, []

        class Stopwatch(self._lib.StoppingCriteria):  # type: ignore[name-defined]
            def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        given = torch.tensor([prompt])
        config = self._lib.GenerationConfig(
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        begin = time.perf_counter()
        output = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            generation_config=config,
            stopping_criteria=self._lib.StoppingCriteriaList([Stopwatch()]),
        )
        tokens = output[0, len(prompt) :].tolist()
        return _generated(tokens, begin, times[0], times[-1])
