"""What can be drawn of a profile: its plan, its layers as the search saw them, the search itself.

Reads the tensors that the search saves beside a profile; those that are missing, or not of the
shape that they should have, are not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from conflayers_cli.profile.schema import Profile
from conflayers_cli.profile.tensors import Tensors, shaped

Values: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One figure of every set that the search evaluated ``[n]``; NaN where it has none.

    ``times``: it is a ratio to vanilla's speed, not a share.
    """

    name: str
    values: Values
    times: bool = False

    @property
    def known(self) -> Values:
        """The finite values."""
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Proposals:
    """What ConfLayers' adaptive threshold was applied to, a row for each proposal ``[n, L−2]``.

    Attributes:
        confidence: of the inner layers 1 … L−2, attention's and the MLP's together.
        z, threshold: the confidence standardised, and what it was compared with.
        selected: whether the layer was to be left out.
        shown: the proposal that became the best set of the search.
    """

    confidence: Values
    z: Values
    threshold: Values
    selected: npt.NDArray[np.bool_]
    shown: int


@dataclass(frozen=True)
class Drawing:
    """All that can be drawn of one profile of ``L`` layers.

    Attributes:
        left_out: whether attention's and the MLP's are left out ``[2, L]``.
        proposals: of ConfLayers; None: another strategy, or not saved.
        alone: agreement with the model when a sub-layer alone is left out ``[2, L]``, NaN where it
            was not tried (greedy); None: not saved.
        curves: the search by iteration; those without any value are left out.
    """

    left_out: npt.NDArray[np.bool_]
    proposals: Proposals | None
    alone: Values | None
    curves: tuple[Curve, ...]


def make_drawing(profile: Profile, tensors: Tensors) -> Drawing:
    """The drawing of a profile and the tensors beside it, if any."""
    depth = profile.model.depth
    left_out = np.zeros((2, depth), dtype=np.bool_)
    left_out[0, list(profile.skip.attention)] = True
    left_out[1, list(profile.skip.mlp)] = True
    speedup = shaped(tensors, "trial_speedup", None)
    return Drawing(
        left_out=left_out,
        proposals=_proposals(tensors, depth, speedup),
        alone=shaped(tensors, "agreement_without", 2, depth),
        curves=tuple(curve for curve in _curves(tensors, depth, speedup) if len(curve.known)),
    )


def _proposals(tensors: Tensors, depth: int, speedup: Values | None) -> Proposals | None:
    names = ("attention_confidence", "mlp_confidence", "z", "threshold")
    attention, mlp, z, threshold = (shaped(tensors, name, None, depth - 2) for name in names)
    selected = shaped(tensors, "selected", None, depth)
    if attention is None or mlp is None or z is None or threshold is None or selected is None:
        return None
    count = len(z)
    if not count or {len(mlp), len(attention), len(threshold), len(selected)} != {count}:
        return None
    shown = count - 1
    # The first set looked at is the balanced one, which nothing proposed.
    if speedup is not None and np.isfinite(speedup[1 : count + 1]).any():
        shown = int(np.nanargmax(speedup[1 : count + 1]))
    return Proposals(attention + mlp, z, threshold, selected[:, 1:-1] > 0, shown)


def _curves(tensors: Tensors, depth: int, speedup: Values | None) -> list[Curve]:
    curves = []
    attention, mlp = (shaped(tensors, f"trial_{n}", None, depth) for n in ("attention", "mlp"))
    selected = shaped(tensors, "selected", None, depth)
    if attention is not None and mlp is not None and len(attention) == len(mlp):
        share = (attention.sum(axis=1) + mlp.sum(axis=1)) / max(2 * (depth - 2), 1)
        curves.append(Curve("skipped share", share))
    elif selected is not None:  # of a profile older than the record of every set
        curves.append(Curve("skipped share", selected.sum(axis=1) / max(depth - 2, 1)))
    drafted, accepted = (shaped(tensors, f"trial_{n}", None) for n in ("drafted", "accepted"))
    if drafted is not None and accepted is not None and len(drafted) == len(accepted):
        rate = np.where(drafted > 0, accepted / np.maximum(drafted, 1), np.nan)
        curves.append(Curve("acceptance", rate))
    if not any(curve.name == "acceptance" and len(curve.known) for curve in curves):
        for name in ("agreement", "matchness"):  # of strategies that judge without decoding
            if (found := shaped(tensors, f"trial_{name}", None)) is not None:
                curves.append(Curve(name, found))
    if speedup is not None:
        curves.append(Curve("expected speed-up", speedup, times=True))
    return curves
