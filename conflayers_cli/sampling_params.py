"""How the tokens of a text are chosen: plain, checked values that need no PyTorch."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from conflayers_cli.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token every time, whatever the other settings; above it,
            tokens are drawn.
        top_k: draw from that many likeliest tokens; None: from all.
        top_p: draw from the likeliest tokens that hold this share; None: from all.
        min_p: draw from tokens at least this share as likely as the likeliest; None: from all.
        repetition_penalty: over 1 makes tokens of the text so far less likely.
        seed: of the random numbers; None: one is drawn for each request.

    Raises:
        InputError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 − 1"),
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

    def note_unused(self) -> None:
        """A note where a setting changes nothing, since tokens are chosen greedily."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        unused = [name for name, value in given.items() if value is not None]
        if self.greedy and unused:
            message = f"note: {', '.join(unused)} changes nothing at temperature 0"
            logger.warning(message, extra={"names": (*unused, "temperature")})


@dataclass(frozen=True)
class LogitAdjustments:
    """What is added to the logits before a token is chosen, as OpenAI's API defines it.

    Attributes:
        presence_penalty: taken from the logits of tokens that the output has.
        frequency_penalty: taken from them as often as it has them.
        logit_bias: (token, what is added to its logit).

    Raises:
        InputError: a value is outside its range.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InputError(f"{name} {getattr(self, name)}: allowed is -2 to 2", names=(name,))
        for token, bias in self.logit_bias:
            if token < 0 or not -100 <= bias <= 100:
                raise InputError(
                    f"logit_bias {token}: {bias}: allowed are token ids and -100 to 100",
                    names=("logit_bias",),
                )

    def __bool__(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


NO_ADJUSTMENTS = LogitAdjustments()
