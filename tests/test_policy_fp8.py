"""FP8 as far as possible without a GPU: what is refused, Megatron's and Transformer Engine's settings, padding."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from etr_megatron.config import Config, Fp8Config, TrainConfig, load_config, resolve
from etr_megatron.errors import UserError
from etr_megatron.policy import Layout, Policy
from etr_megatron.policy import fp8 as policy_fp8
from etr_megatron.policy.model_config import transformer_config
from etr_megatron.policy.packing import pack
from etr_megatron.weights import read_architecture
from tests.nursery import ROOT

ONE_RANK = Layout(rank=0, world=1, tp=1, tp_rank=0, pp=1, stage=0, dp=1, dp_rank=0, ep=1, ep_rank=0, etp=1, etp_rank=0)
SEQUENCES = [([7, 8, 9], [1, 2]), ([5], [3] * 200)]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["fp8.recipe=blockwise"],
            'fp8.recipe = "blockwise": FP8 needs a GPU, and this job runs on CPU; set fp8.recipe to none',
        ),
        (
            ["train.optimizer_offload=true", "train.distributed_optimizer=true"],
            "train.optimizer_offload = true: there is no GPU memory to offload from on CPU; set optimizer_offload to false",
        ),
        (
            ["train.grads_dtype=bfloat16"],
            'train.grads_dtype = "bfloat16", model.dtype = "auto": the model is float32 on CPU, and so are its gradients; set '
            "grads_dtype to float32, or dtype to bfloat16",
        ),
    ],
)
def test_what_needs_a_gpu_or_does_nothing_on_cpu_is_refused_there_in_one_sentence(overrides, sentence):
    config = load_config(None, overrides)
    assert resolve(config, 1, cuda=True).fp8 == config.fp8
    with pytest.raises(UserError) as caught:
        resolve(config, 1, cuda=False)
    assert [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]] == [sentence]


def test_fp8_without_transformer_engine_is_refused_rather_than_trained_in_bf16(monkeypatch):
    monkeypatch.setattr(policy_fp8.platform, "uses_cuda", lambda: True)
    monkeypatch.setattr(policy_fp8.importlib.util, "find_spec", lambda name: None)
    policy_fp8.require_fp8(Fp8Config())
    with pytest.raises(UserError, match=r"^fp8\.recipe=tensorwise needs Transformer Engine, which is not installed: [^\n]*$"):
        policy_fp8.require_fp8(Fp8Config(recipe="tensorwise"))


@pytest.mark.parametrize(
    ("recipe", "number_format", "history"),
    [("blockwise", "e4m3", 1), ("tensorwise", "hybrid", 1), ("delayed", "hybrid", 1024), ("mxfp8", "e4m3", 1)],
)
def test_megatron_is_told_the_recipe(hf_models, recipe, number_format, history):
    fp8 = Fp8Config(recipe=recipe, param=True, first_last_layers_bf16=recipe != "delayed")
    arch = read_architecture(hf_models["qwen3"])
    found = transformer_config(arch, ONE_RANK, sequence_parallel=False, dtype=torch.bfloat16, fp8=fp8)
    assert (found.fp8, found.fp8_recipe, found.fp8_amax_history_len) == (number_format, recipe, history)
    assert found.fp8_param and found.first_last_layers_bf16 == (recipe != "delayed")
    plain = transformer_config(arch, ONE_RANK, sequence_parallel=False, dtype=torch.bfloat16, fp8=Fp8Config())
    assert plain.fp8 is None and not plain.fp8_param


@pytest.mark.parametrize(("recipe", "block"), [("none", 1), ("blockwise", 128), ("mxfp8", 32), ("delayed", 16)])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (4, 1), (2, 2)])
def test_every_rank_has_a_multiple_of_the_recipes_tokens_between_tensor_parallel_regions(recipe, block, tp, cp):
    multiple = policy_fp8.token_multiple(Fp8Config(recipe=recipe), tp, sequence_parallel=tp > 1)
    for numbers in ([0, 1], [0], []):
        batch = pack(SEQUENCES, numbers, multiple=multiple, device=torch.device("cpu"), cp=cp, cp_rank=cp - 1)
        assert batch.tokens.shape[1] % (tp * block) == 0
        # Padding is a separate sequence: no real one is extended.
        real = len(numbers)
        assert len(batch.cu_seqlens) - 1 - real in (0, 1)
        assert batch.cu_seqlens[real] <= sum(len(p) + len(r) + 2 * cp for p, r in (SEQUENCES[i] for i in numbers))


FIRST_IMPORTS = """
import os, sys
import torch.fx.experimental.symbolic_shapes  # most of what Megatron imports first: here once for all

for capability in ((9, 0), (10, 0), (12, 0)):
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    try:
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda *_: capability
        from etr_megatron import platform

        platform.prepare_megatron()
    finally:
        os._exit(0)
"""


@pytest.mark.slow
def test_transformer_engine_finds_in_the_environment_which_scales_the_device_has(tmp_path):
    package, seen, name = tmp_path / "transformer_engine", tmp_path / "seen", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    package.mkdir()
    # The import of the stand-in ends the program.
    said = (
        f"import os\nwith open({str(seen)!r}, 'a') as file:\n    file.write(os.environ.get({name!r}, '-'))\nraise SystemExit\n"
    )
    (package / "__init__.py").write_text(said)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    env.pop(name, None)
    subprocess.run([sys.executable, "-c", FIRST_IMPORTS], env=env, check=True, capture_output=True, timeout=120)
    assert seen.read_text() == "100"


def test_the_optimizer_starts_from_the_loaded_weights_not_from_what_those_held_in_fp8_were_made_with(gangs, hf_models):
    found = gangs(1).run("tests.policy_jobs:start_of_weights_held_in_fp8", model=hf_models["qwen3"])[0]
    assert found and all(torch.equal(main, loaded) for main, loaded in found.values())


def test_whoever_needs_whole_weights_leaves_no_stale_copies_of_those_held_in_fp8(gangs, hf_models):
    """After a weight sync, all weights have been gathered, and the next forward pass finds nothing to do."""
    for stale in gangs(2).run("tests.policy_jobs:not_processed_after_gathering", model=hf_models["qwen3"]):
        assert stale == []


def test_fp8_copies_of_weights_leave_the_gpu_for_the_rollout():
    def layer() -> torch.nn.Module:
        found = torch.nn.Linear(2, 3)
        found._fp8_workspaces = {"weight": torch.ones(12)}  # as Transformer Engine's modules do
        return found

    layers = [layer() for _ in range(3)]
    chunks, reference = [torch.nn.Sequential(layers[0], torch.nn.SiLU()), layers[1]], [torch.nn.Sequential(layers[2])]
    for offload, kept in ((False, 1), (True, 0)):
        config = Config(train=TrainConfig(offload_for_rollout=offload))
        Policy.offload(SimpleNamespace(config=config, _ddp=[], chunks=chunks, reference=reference, optimizer=mock.Mock()))
        assert [len(one._fp8_workspaces) for one in layers] == [kept] * 3


def with_transformer_engine(monkeypatch, **modules: types.ModuleType | None) -> None:
    """A machine with a GPU and a Transformer Engine of these modules; a module that is None cannot be imported."""
    monkeypatch.setattr(policy_fp8.platform, "uses_cuda", lambda: True)
    monkeypatch.setattr(policy_fp8.importlib.util, "find_spec", lambda name: object())
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def test_a_transformer_engine_that_cannot_be_imported_is_refused_whatever_the_recipe(monkeypatch):
    # Megatron would treat it as not installed while we assume that its layers exist, which ends in a NameError.
    with_transformer_engine(monkeypatch, transformer_engine=None)
    for recipe in ("none", "tensorwise"):
        with pytest.raises(UserError, match=r"^Transformer Engine is installed but cannot be imported \([^\n]+$"):
            policy_fp8.require_fp8(Fp8Config(recipe=recipe))


def test_a_recipe_that_the_device_does_not_have_is_refused_before_anything_is_loaded(monkeypatch):
    answers = {"is_fp8_available": (True, ""), "is_mxfp8_available": (False, "Compute capability 10.0 or higher required.")}
    answers["is_fp8_block_scaling_available"] = (True, "")
    fp8 = types.ModuleType("transformer_engine.pytorch.fp8")
    fp8.FP8GlobalStateManager = SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in answers.items()})
    package = types.ModuleType("transformer_engine")
    with_transformer_engine(
        monkeypatch, transformer_engine=package, transformer_engine__pytorch=package, transformer_engine__pytorch__fp8=fp8
    )
    for recipe in ("none", "blockwise", "tensorwise", "delayed"):
        policy_fp8.require_fp8(Fp8Config(recipe=recipe))
    with pytest.raises(UserError) as caught:
        policy_fp8.require_fp8(Fp8Config(recipe="mxfp8"))
    assert str(caught.value) == (
        "fp8.recipe=mxfp8 cannot run on this device: Compute capability 10.0 or higher required. Choose another, or set "
        "fp8.recipe=none"
    )
