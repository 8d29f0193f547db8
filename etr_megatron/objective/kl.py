"""Per-token estimators of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

from torch import Tensor


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, bound: float = 20.0) -> Tensor:
    """KL per token, shape of `logp` [R].

    k1: -log r, unbiased, may be negative. k2: (log r)^2 / 2. k3: r - 1 - log r, unbiased and non-negative; with
    log r = log pi_ref - log pi, bounded by `bound` in k3 alone, which grows with its exponential. Raises ValueError for another
    name.

    As a term of the loss they are not what their values say, for the gradient does not go through the sampling. Per token it is
    k1: grad log pi, whose mean under pi is zero whatever pi_ref is: no use in the loss.
    k2: -(log r) grad log pi, in the mean the gradient of KL(pi || pi_ref). k3: (1 - r) grad log pi, in the mean the gradient of
    KL(pi_ref || pi), the same near pi_ref.

    As a part of the reward they are constants, and the policy gradient makes E[k grad log pi] of them. Of k1 that is the
    gradient of KL(pi || pi_ref). Of k3 it is that less the gradient of KL(pi_ref || pi), and of k2 it is of second order in
    log r: both vanish near pi_ref, so that they hold nothing back there. The config refuses them in the reward.
    """
    log_ratio = ref_logp - logp
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        bounded = log_ratio.clamp(-bound, bound)
        return bounded.exp() - 1 - bounded
    raise ValueError(f"objective.kl_estimator is {kind!r}; known: k1, k2, k3")
