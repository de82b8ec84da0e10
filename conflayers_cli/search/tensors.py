"""What a search leaves behind beside the profile: its tensors, and its course trial by trial."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from conflayers_cli.search.problem import SearchResult, Trial

PREFIX = "trial_"


def tensors_of(result: SearchResult, depth: int) -> dict[str, torch.Tensor]:
    """The strategy's own tensors and, of every strategy alike, those of `trial_tensors`."""
    return {**result.tensors, **trial_tensors(result.trials, depth)}


def trial_tensors(trials: Sequence[Trial], depth: int) -> dict[str, torch.Tensor]:
    """The course of a search, a row for each of ``n`` trials; nothing where there is none.

    ``trial_attention`` and ``trial_mlp`` (uint8 ``[n, depth]``) are 1 where the sub-layer was left
    out; ``trial_steps``, ``trial_drafted`` and ``trial_accepted`` (int64 ``[n]``) are 0 for plans
    judged without decoding; ``trial_speedup`` (float64 ``[n]``) is the predicted one over vanilla,
    NaN where it is not known. The strategy's own figures, ``trial_lambda`` for one, are float64
    ``[n]``, NaN where a trial has none.
    """
    if not trials:
        return {}
    left_out = torch.zeros((2, len(trials), depth), dtype=torch.uint8)
    for row, trial in enumerate(trials):
        left_out[0, row, list(trial.plan.attention)] = 1
        left_out[1, row, list(trial.plan.mlp)] = 1
    found = {"attention": left_out[0].clone(), "mlp": left_out[1].clone()}
    for name in ("steps", "drafted", "accepted"):
        found[name] = torch.tensor([getattr(trial, name) for trial in trials])
    names = dict.fromkeys(name for trial in trials for name in trial.figures)
    figures = {name: [trial.figures.get(name) for trial in trials] for name in names}
    figures["speedup"] = [trial.speedup for trial in trials]
    for name, values in figures.items():
        known = [math.nan if value is None else float(value) for value in values]
        found[name] = torch.tensor(known, dtype=torch.float64)
    return {f"{PREFIX}{name}": values for name, values in found.items()}
