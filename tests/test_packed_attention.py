"""Which GPUs need the package flash-attn."""

from __future__ import annotations

import pytest

from etr_megatron.errors import UserError
from etr_megatron.policy import packed_attention
from etr_megatron.policy.packed_attention import require_packed_attention


@pytest.fixture
def gpu(monkeypatch):
    def of(capability: tuple[int, int], *, flash_attn: bool = False, transformer_engine: bool = True) -> None:
        monkeypatch.setattr(packed_attention, "uses_transformer_engine", lambda: transformer_engine)
        monkeypatch.setattr(packed_attention.torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(packed_attention.torch.cuda, "get_device_name", lambda: "NVIDIA X")
        found = {"flash_attn": object()} if flash_attn else {}
        monkeypatch.setattr(packed_attention.importlib.util, "find_spec", found.get)

    return of


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_a_gpu_without_a_kernel_for_packed_sequences_is_refused_unless_flash_attn_or_its_absence_is_chosen(gpu, capability):
    gpu(capability)
    with pytest.raises(
        UserError, match=r"on NVIDIA X \(compute capability \d+\.\d\) without the package flash-attn: install it"
    ):
        require_packed_attention({}, "bfloat16")
    require_packed_attention({"attention_backend": "unfused"}, "bfloat16")
    require_packed_attention({}, "float32")
    gpu(capability, flash_attn=True)
    require_packed_attention({}, "bfloat16")
    gpu(capability, transformer_engine=False)
    require_packed_attention({}, "bfloat16")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_hopper_and_blackwell_need_no_other_package(gpu, capability):
    gpu(capability)
    require_packed_attention({}, "bfloat16")
