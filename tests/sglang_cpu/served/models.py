"""The models that tests serve. SGLang imports those of its own, some 200 modules, only for another one."""

from sglang.srt.models import deepseek_v2, glm4_moe, glm4_moe_lite, qwen3, qwen3_moe

EntryClass = [
    *(qwen3.EntryClass, qwen3_moe.EntryClass),
    *(*glm4_moe.EntryClass, *glm4_moe_lite.EntryClass, *deepseek_v2.EntryClass),
]
