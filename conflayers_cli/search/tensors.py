"""Tensors saved beside a profile: the strategy's own, and the search trial by trial."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from conflayers_cli.search.problem import SearchResult, Trial


def collect_tensors(result: SearchResult, depth: int) -> dict[str, torch.Tensor]:
    """The strategy's own tensors and those of `trial_tensors`."""
    return {**result.tensors, **trial_tensors(result.trials, depth)}


def trial_tensors(trials: Sequence[Trial], depth: int) -> dict[str, torch.Tensor]:
    """The trials of a search, one entry for each of ``n``; no tensors where there are no trials.

    ``trial_attention``, ``trial_mlp`` (uint8 ``[n, depth]``): 1 where the sub-layer was skipped.
    ``trial_steps``, ``trial_drafted``, ``trial_accepted`` (int64 ``[n]``): 0 without decoding.
    ``trial_speedup`` (predicted, over vanilla) and the strategy's own figures, such as
    ``trial_lambda`` (float64 ``[n]``): NaN where a trial has none.
    """
    if not trials:
        return {}
    skipped = torch.zeros((2, len(trials), depth), dtype=torch.uint8)
    for i, trial in enumerate(trials):
        skipped[0, i, list(trial.plan.attention)] = 1
        skipped[1, i, list(trial.plan.mlp)] = 1
    found = {"attention": skipped[0].clone(), "mlp": skipped[1].clone()}
    for name in ("steps", "drafted", "accepted"):
        found[name] = torch.tensor([getattr(trial, name) for trial in trials])
    names = dict.fromkeys(name for trial in trials for name in trial.figures)
    figures = {name: [trial.figures.get(name) for trial in trials] for name in names}
    figures["speedup"] = [trial.speedup for trial in trials]
    for name, values in figures.items():
        floats = [math.nan if value is None else value for value in values]
        found[name] = torch.tensor(floats, dtype=torch.float64)
    return {f"trial_{name}": values for name, values in found.items()}
