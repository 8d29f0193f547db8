"""What SGLang's latent attention (MLA) lacks on CPU: a prefill that its `torch_native` backend computes rightly."""

from __future__ import annotations


def attend_to_latents() -> None:
    """Make `torch_native` attend to the latents themselves in a prefill, as in decoding.

    A backend without an entry there gets the one of Triton (`deepseek_common/attention_backend_handler.py`, 0.5.21). That one
    projects the latents of a prefill up to keys and values, which `torch_native` then looks for in the cache of the latents.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
