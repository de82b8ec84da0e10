"""The gates of a bench: what has to hold for it to end with code 0."""

from __future__ import annotations

from conflayers_cli.bench.comparison import Comparison
from conflayers_cli.bench.schema import BenchDocument


def broken_gates(
    bench: BenchDocument, fail_under: float | None, comparison: Comparison | None
) -> list[str]:
    """What does not hold, in words; empty where all does.

    Args:
        bench: the results.
        fail_under: the least speed-up over vanilla; None: any.
        comparison: with an earlier bench, if there is one.
    """
    broken = []
    speedup = bench.speedup.median
    if fail_under is not None and speedup is None:
        broken.append(
            "--fail-under: the speed-up could not be measured: no output is longer than one token"
        )
    elif fail_under is not None and speedup is not None and not speedup >= fail_under:
        broken.append(f"--fail-under: the speed-up is {speedup:.3f}, under {fail_under:g}")
    if comparison:
        broken += [f"--compare: {told}" for told in comparison.regressions]
    # In half precision a GPU's rounding may part outputs at a near-tie; that is reported only.
    identity = bench.identical_outputs
    exact = bench.dtype == "float32" and bench.engine.get("exact_to_the_bit") is True
    if identity and identity.divergences and exact:
        parted = ", ".join(divergence.id for divergence in identity.divergences[:5])
        broken.append(
            f"greedy outputs in float32 differ from vanilla's at {len(identity.divergences)} of "
            f"{identity.total} prompts ({parted})"
        )
    return broken
