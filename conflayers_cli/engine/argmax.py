"""The most likely token, and how logits that are NaN or infinite are noticed.

Logits that are NaN (an overflow in half precision, a damaged weight), infinite, or all minus
infinity (which rules single tokens out) have no next token. Their maximum shows it: PyTorch's is
NaN wherever one is. So nothing is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from conflayers_cli.errors import ConfLayersError

INVALID_TOKEN = -1
"""In place of a token where the logits are not finite."""


class LogitsError(ConfLayersError):
    """The whole model's logits are NaN or infinite where a next token was to be chosen.

    Attributes:
        number: the prompt's, among those decoded together; None: it is the only one.
    """

    number: int | None = None

    @classmethod
    def at(cls, step: int, position: int, dtype: torch.dtype) -> LogitsError:
        """For the ``step``-th new token, which the logits at ``position`` were to decide."""
        name = str(dtype).removeprefix("torch.")
        advice = (
            "the model's weights are damaged, or can't be run like this"
            if dtype == torch.float32
            else f"dtype float32 reaches further than {name}; "
            "if that does not help, the model's weights are damaged"
        )
        return cls(
            f"the logits of step {step} (position {position}) are NaN or infinite, "
            f"so there is no next token: {advice}",
            names=("dtype float32",),
        )

    def for_prompt(self, name: str) -> LogitsError:
        """The same, naming the prompt."""
        error = type(self)(f"{name}: {self}", names=self.names)
        error.number = self.number
        return error


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """The first token of the highest logit, ``[..., V] → [...]`` int64; `INVALID_TOKEN` where the
    logits are not finite."""
    if logits.device.type == "cpu":
        chosen = [token if best - best == 0 else INVALID_TOKEN for token, best, _ in _rows(logits)]
        return torch.tensor(chosen, dtype=torch.int64).view(logits.shape[:-1])
    best, tokens = logits.max(dim=-1)
    # Only a finite number less itself is 0.
    return tokens.masked_fill_(best - best != 0, INVALID_TOKEN)


def greedy_with_confidence(logits: torch.Tensor) -> torch.Tensor:
    """The most likely tokens of ``[..., V]`` and how sure they are, to be read at once.

    float64 ``[2, ...]``, in which token ids are exact; the confidence is that of
    `engine.token_choice.TokenChoice`. Where the logits are not finite it is NaN, and the token
    still a valid id: a pass on it may be running already.
    """
    best, tokens = logits.max(dim=-1, keepdim=True)
    # The second one without sorting: the highest of the others.
    second = logits.scatter(-1, tokens, -torch.inf).amax(dim=-1, keepdim=True)
    best = best.double()
    confidence = torch.sigmoid(best - second.double()) + (best - best)
    return torch.stack([tokens.double(), confidence]).squeeze(-1)


def read_greedy(logits: torch.Tensor) -> torch.Tensor:
    """What `greedy_with_confidence` gives, on the CPU; where the logits are there, by NumPy."""
    if logits.device.type != "cpu":
        return greedy_with_confidence(logits).cpu()
    found = [(token, best, _second(row, token)) for token, best, row in _rows(logits)]
    chosen = torch.tensor(found, dtype=torch.float64).view(*logits.shape[:-1], 3)
    tokens, best, second = chosen.unbind(-1)
    return torch.stack([tokens, torch.sigmoid(best - second) + (best - best)])


def float_row(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """Logits ``[V]`` on the CPU as NumPy's.

    NumPy works in the calling thread alone. PyTorch would share so many numbers among its threads,
    which then spin for a while and take the processor from those that run the next pass: that took
    a third to a half longer.
    """
    if logits.dtype != torch.bfloat16:
        return logits.numpy().astype(np.float32, copy=False)
    upper = logits.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    upper <<= 16
    return upper.view(np.float32)


def most_likely(row: npt.NDArray[np.float32], count: int) -> list[tuple[int, float]]:
    """The ``count`` most likely tokens by logits ``[V]``, the first of the highest logit first, and
    their shares of one another's probability; none where the logits are not finite."""
    first = int(row.argmax())
    if not math.isfinite(row[first]):
        return []
    count = min(count, len(row))
    top = np.argpartition(row, -count)[-count:]
    others = sorted((int(i) for i in top if i != first), key=lambda i: (-row[i], i))
    tokens = [first, *others[: count - 1]]
    weights = np.exp(row[tokens] - row[first])
    return list(zip(tokens, (weights / weights.sum()).tolist(), strict=True))


def _rows(logits: torch.Tensor) -> Iterator[tuple[int, float, npt.NDArray[np.float32]]]:
    """(first token of the highest logit, that logit, all of them) of each row ``[V]``.

    NumPy's argmax takes NaN for the highest, as PyTorch's maximum does.
    """
    for row in logits.detach().reshape(-1, logits.shape[-1]):
        numbers = float_row(row)
        token = int(numbers.argmax())
        yield token, float(numbers[token]), numbers


def _second(row: npt.NDArray[np.float32], token: int) -> float:
    """The highest of the other logits; minus infinity: there is none."""
    parts = (row[:token], row[token + 1 :])
    return max((float(part.max()) for part in parts if len(part)), default=-math.inf)
