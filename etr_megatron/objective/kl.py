"""Per-token estimators of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

from torch import Tensor


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, bound: float = 20.0) -> Tensor:
    """KL per token, of the shape of `logp` [R].

    With log r = log pi_ref - log pi: k1 is -log r, unbiased, may be negative. k2 is (log r)^2 / 2. k3 is r - 1 - log r,
    unbiased and non-negative; only k3, being exponential in log r, bounds it by `bound`. Raises ValueError for an unknown name.

    As a loss term, the mean gradient of an estimator is not the gradient of its expectation, because it does not go through the
    sampling. Per token the gradient is
    k1: grad log pi, with mean zero under pi for any pi_ref: useless in the loss.
    k2: -(log r) grad log pi, whose mean is the gradient of KL(pi || pi_ref).
    k3: (1 - r) grad log pi, whose mean is the gradient of KL(pi_ref || pi), the same near pi_ref.

    In the reward an estimator is a constant, and the policy gradient turns it into E[k grad log pi]. For k1 that is the
    gradient of KL(pi || pi_ref). For k3 it is the gradient of KL(pi || pi_ref) minus that of KL(pi_ref || pi). For k2 it is of
    second order in log r. Both vanish near pi_ref and so do not restrain the policy there: the config refuses them in the
    reward.
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
