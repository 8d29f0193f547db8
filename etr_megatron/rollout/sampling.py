"""Draws the next token from one uniform number per row, so that a row's draw depends only on its own logits and seed."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(probabilities: Tensor, top_p: float, top_k: int) -> Tensor:
    """Probabilities [B, V] with everything outside the top-p nucleus or the top k set to zero; not renormalised."""
    if top_p >= 1.0 and top_k <= 0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    # A token is kept if the mass of the tokens before it is below top_p, so the most likely token is always kept.
    drop = ordered.cumsum(-1) - ordered >= top_p
    if top_k > 0:
        drop[:, top_k:] = True
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(drop, 0.0))


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Next tokens int64 [B] and their log-probs fp32 [B] under the full tempered distribution (before top-p and top-k).

    logits: [B, V]. uniform: float64 [B] in [0, 1), the row's random number (inverse CDF). temperature 0 takes the most likely
    token, with its log-prob at temperature 1.
    """
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cumulative = keep_top(log_p.double().exp(), top_p, top_k).cumsum(-1)
        # Scaling the uniform number by the kept mass renormalises. Rounding may lead past the last kept token: then take that.
        wanted = uniform[:, None] * cumulative[:, -1:]
        last = (cumulative < cumulative[:, -1:]).sum(-1)
        tokens = torch.minimum(torch.searchsorted(cumulative, wanted, right=True).squeeze(-1), last)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(-1)
