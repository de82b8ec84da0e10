"""TODO: conflayers_cli.sampling_params"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conflayers_cli.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy, whatever the other settings.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "over 0, at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "over 0 (1 is none)",
            ),
        )
        for name, value, holds, allowed in checks:
            if not holds:
                raise InputError(f"{name} {value}: allowed is {allowed}", names=(name,))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
