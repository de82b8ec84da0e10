"""The best token of each row of logits, and how it shows that a row has none.

A row whose logits are not numbers names no token: NaN, which an overflow in half precision or a
damaged weight leads to, infinity, or nothing but minus infinity. (Minus infinity for some tokens is
how models rule these out.) Its largest logit tells, which is looked for in any case: PyTorch's
maximum is NaN wherever one is. So nothing is read twice, and on a GPU the sign travels with the
token.
"""

from __future__ import annotations

import torch

from conflayers_cli.errors import ConfLayersError

INVALID_TOKEN = -1
"""What stands for the token of a row that names none."""


class LogitsError(ConfLayersError):
    """The whole model's logits are no numbers where a text was to go on.

    Attributes:
        bare: the message without the text's name.
        number: of the text among those decoded together; None: it is the only one.
    """

    bare = ""
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
        error = cls(
            f"the logits of step {step} (position {position}) are NaN or infinite, "
            f"so there is no next token: {advice}",
            names=("dtype float32",),
        )
        error.bare = str(error)
        return error

    def of(self, text: str) -> LogitsError:
        """The same, naming the text."""
        error = type(self)(f"{text}: {self.bare}", names=self.names)
        error.bare, error.number = self.bare, self.number
        return error


def greedy_tokens(scores: torch.Tensor) -> torch.Tensor:
    """The first token of the highest score, ``[..., V] → [...]`` int64; `INVALID_TOKEN` where the
    scores are not numbers.

    Otherwise the same as ``argmax``, which takes five times as long on half-precision CPU tensors.
    """
    best, tokens = scores.max(dim=-1)
    # Only a number less itself is 0.
    return tokens.masked_fill_(best - best != 0, INVALID_TOKEN)


def best_with_probability(scores: torch.Tensor) -> torch.Tensor:
    """The best tokens and their probabilities, one tensor to be read at once.

    Args:
        scores: ``[..., V]``.

    Returns:
        float64 ``[2, ...]``, in which token ids are exact. Where the scores are not numbers the
        probability is NaN, and the token one that there is: a pass on it may be under way already.
    """
    scores = scores.float()
    best, tokens = scores.max(dim=-1)
    confidence = torch.exp(best - torch.logsumexp(scores, dim=-1))
    return torch.stack([tokens.double(), confidence.double()])
