"""Values that `objective.preset` gives to the null fields of `ObjectiveConfig`."""

from __future__ import annotations

Preset = dict[str, float | str | bool]

# The presets that are compared with each other differ only in the clip range and share these values.
_COMMON: Preset = dict(loss="clipped", aggregation="token_mean", baseline="group_mean", normalize=True, kl_in="loss")
_FIXED: Preset = dict(
    micro="none", macro="none", control="none", alpha=0.0, gamma=0.0, eps_low=0.2, eps_high=0.2, eps_min=0.0, eps_max=0.99
)
_ETR: Preset = {
    **_COMMON,
    **dict(micro="tanh", macro="variance", control="none", alpha=0.5, gamma=0.5),
    **dict(eps_low=0.2, eps_high=0.2, eps_min=0.05, eps_max=0.4),
}
_GRPO: Preset = {**_COMMON, **_FIXED}
PRESETS: dict[str, Preset] = {
    "etr": _ETR,
    "grpo": _GRPO,
    "dapo": {**_GRPO, "eps_high": 0.28},
    "etr_micro": {**_ETR, "macro": "none", "gamma": 0.0},
    "etr_macro": {**_ETR, "micro": "none", "alpha": 0.0},
    "etr_second_order": {**_ETR, "micro": "linear", "macro": "std", "alpha": 0.0, "gamma": 0.0, "eps_min": 0.0},
    "etr_matched": {**_ETR, "control": "matched"},
    "etr_shuffled": {**_ETR, "control": "shuffled"},
    "etr_inverted_macro": {**_ETR, "macro": "inverse_variance"},
    "dr_grpo": {**_GRPO, "aggregation": "constant_length", "normalize": False},
    "gspo": {**_GRPO, "loss": "gspo", "aggregation": "sequence_mean", "eps_low": 3e-4, "eps_high": 4e-4},
    # The paper sets no lower bound and does not disclose its upper bound; here weights are clipped at 5.
    "cispo": {**_GRPO, "loss": "cispo", "eps_low": 1.0, "eps_high": 4.0, "eps_max": 4.0},
    # A sum over each response as in the paper, up to a constant; the clip range is not used.
    "rloo": {
        **_GRPO,
        **dict(loss="reinforce", aggregation="constant_length", baseline="leave_one_out", normalize=False, kl_in="reward"),
    },
}

LOSSES = ("clipped", "gspo", "cispo", "reinforce")
"""Losses that can be referred to by name."""
