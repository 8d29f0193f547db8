"""The reward that is trained on, made from the verifier's: the length penalty of DAPO and the KL penalty of RLOO and PPO."""

from __future__ import annotations

from torch import Tensor


def overlong_punishment(length: int, *, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13) of a response of `length` tokens, in [-1, 0].

    0 up to `max_length - buffer` tokens, from there linear to -1 at `max_length`. buffer: tokens; 0 is no punishment.
    """
    if not buffer:
        return 0.0
    return -min(max(0, length - (max_length - buffer)) / buffer, 1.0)


def kl_penalty(old_logp: Tensor, ref_logp: Tensor) -> float:
    """KL(pi_old || pi_ref) of one response, in nats: the k1 estimate summed over its tokens [response tokens].

    k1 alone, for the reason that `kl_estimate` gives.
    """
    return (old_logp.double() - ref_logp.double()).sum().item()
