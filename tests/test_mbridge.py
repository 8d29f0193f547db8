"""The mbridge package, another exporter, on Megatron models that we built and loaded: the same tensors, bit for bit."""

from __future__ import annotations

import pytest
import torch

# mbridge is in the test extra. The ranks import it, because megatron.core has to be prepared first.

LAYOUTS = {
    "tp1": (1, ["parallel.tp=1"]),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.tp=1", "parallel.pp=2"]),
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"]),
    "tp2_ep2_etp1": (2, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"]),
}
CASES = [
    (family, *LAYOUTS[layout])
    for family, layout in [
        *(("qwen3", "tp1"), ("llama", "tp2"), ("qwen2", "tp2"), ("qwen3_tied", "pp2")),
        *(("qwen3_moe", "tp2"), ("qwen3_moe", "ep2"), ("qwen3_moe_dense", "pp2"), ("qwen3_moe_dense", "tp2_ep2_etp1")),
        *(("glm4_moe", "tp2"), ("glm4_moe", "pp2"), ("deepseek_v3", "tp2_ep2_etp1"), ("deepseek_v3", "pp2")),
    ]
]


def name_of(value) -> str:
    return "-".join(value).replace("parallel.", "").replace("=", "") if isinstance(value, list) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "world", "layout"), CASES, ids=name_of)
def test_mbridge_exports_the_tensors_that_we_export(gangs, hf_models, family, world, layout):
    for theirs, ours in gangs(world).run("tests.mbridge_jobs:exports", model=hf_models[family], overrides=layout):
        assert theirs.keys() == ours.keys()
        different = [name for name in ours if not torch.equal(theirs[name], ours[name])]
        assert not different


@pytest.mark.parametrize(("family", "world", "layout"), CASES, ids=name_of)
def test_mbridge_loads_into_every_rank_what_we_load(gangs, hf_models, family, world, layout):
    for found in gangs(world).run("tests.mbridge_jobs:cross_load", model=hf_models[family], overrides=layout):
        assert found and all(found.values()), [name for name, equal in found.items() if not equal]
