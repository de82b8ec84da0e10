"""The most likely token, and how logits that are NaN or infinite are noticed.

Logits that are NaN (an overflow in half precision, a damaged weight), infinite, or all minus
infinity (which rules single tokens out) have no next token. Their maximum shows it: PyTorch's is
NaN wherever one is. So nothing is read twice.
"""

from __future__ import annotations

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
    logits are not finite.

    Otherwise the same as ``argmax``, which takes five times as long on half-precision CPU tensors.
    """
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
