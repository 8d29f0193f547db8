"""Reward shaping on top of the verifier's reward: the length penalty of DAPO and the KL penalty of RLOO and PPO."""

from __future__ import annotations

from torch import Tensor


def overlong_punishment(length: int, *, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13) for a response of `length` tokens, in [-1, 0].

    0 up to `max_length - buffer` tokens, then linear to -1 at `max_length`. buffer: in tokens; 0 means no punishment.
    """
    if not buffer:
        return 0.0
    return -min(max(0, length - (max_length - buffer)) / buffer, 1.0)


def kl_penalty(old_logp: Tensor, ref_logp: Tensor) -> float:
    """KL(pi_old || pi_ref) of one response, in nats: the k1 estimate summed over its tokens [response tokens].

    Only k1 is valid in the reward, see `kl_estimate`.
    """
    return (old_logp.double() - ref_logp.double()).sum().item()
