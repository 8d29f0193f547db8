"""`train.megatron`: fields of Megatron that are passed on change no number, and all others are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from etr_megatron import check_fields, launch
from etr_megatron.checks import check_architecture, check_model, check_server_node
from etr_megatron.config import Config, InvalidConfigError, dump_yaml, load_config, resolve, validate
from etr_megatron.config.megatron_fields import FIELDS, GOVERNED, REFUSED
from etr_megatron.errors import UserError
from etr_megatron.policy.megatron_fields import AttnBackend, complaints_about, fields_of
from etr_megatron.policy.model import forget_routing
from etr_megatron.policy.model_config import MLATransformerConfig
from etr_megatron.policy.optimizer import DistributedDataParallelConfig, OptimizerConfig, optimizer_config
from etr_megatron.weights import read_architecture
from tests.hf_models import random_sequences
from tests.runs import REPO

OWNERS = {"model": MLATransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
BLOCK = "recompute_granularity: full, recompute_method: block, recompute_num_layers: 1"
FULL = ["train.megatron.recompute_granularity=full", "train.megatron.recompute_method=block"]


def parts(*names: str) -> str:
    return f"{{recompute_granularity: selective, recompute_modules: [{', '.join(names)}]}}"


def layers(*names: str, chunk: int = 0) -> list[str]:
    return [f"{chunk}.decoder.layers.{name}" for name in names]


NUMBERS: dict[str, tuple[str, int, list[str], dict[str, list[str]]]] = {
    # The fields, and modules that run once more than without them.
    "dense": (
        "qwen3",
        1,
        ["parallel.tp=1"],
        {
            f"{{{BLOCK}}}": layers("0", "0.mlp"),
            parts("mlp", "layernorm"): layers("0.mlp", "3.mlp", "0.input_layernorm", "3.pre_mlp_layernorm"),
            "{deterministic_mode: true}": [],
        },
    ),
    "experts_of_two_ranks": ("qwen3_moe", 2, ["parallel.tp=1", "parallel.ep=2"], {parts("moe"): layers("0.mlp.router")}),
    "latents_and_shared_experts": (
        "deepseek_v3",
        1,
        ["parallel.tp=1"],
        {parts("mla_up_proj", "shared_experts"): layers("0.self_attention.linear_q_up_proj", "3.mlp.shared_experts")},
    ),
    "tp2": ("qwen3", 2, ["parallel.tp=2"], {f"{{{BLOCK}, distribute_saved_activations: true}}": layers("0")}),
    "pp2_vpp2": (
        "qwen3",
        2,
        ["parallel.tp=1", "parallel.pp=2", "parallel.vpp=2"],
        {f"{{{BLOCK}, overlap_p2p_comm_warmup_flush: true}}": [*layers("0"), *layers("0", chunk=1)]},
    ),
    "pp2": (
        "qwen3",
        2,
        ["parallel.tp=1", "parallel.pp=2"],
        {f"{{{BLOCK}, deallocate_pipeline_outputs: true}}": layers("0")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NUMBERS)
def test_recomputed_parts_and_fused_kernels_give_the_same_loss_and_gradients(gangs, hf_models, case):
    model, world, overrides, more = NUMBERS[case]
    job = {"model": hf_models[model], "sequences": random_sequences(), "overrides": overrides, "fields": list(more)}
    for plain, *others in gangs(world).run("tests.megatron_field_jobs:updates", **job):
        for modules, other in zip(more.values(), others, strict=True):
            assert_same_update(other, plain)
            once = {name: passes for name, passes in other["passes"].items() if passes != plain["passes"][name]}
            assert set(modules) <= once.keys() and bool(modules) == bool(once)
            assert all(passes == 2 * plain["passes"][name] for name, passes in once.items())
            if modules == layers("0", "0.mlp"):
                assert all(name.startswith("0.decoder.layers.0") for name in once)


def assert_same_update(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert (found["loss"], found["norm"]) == pytest.approx((wanted["loss"], wanted["norm"]), rel=1e-6)
    for name, tensor in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, atol=1e-6, rtol=0, msg=name)


def test_reductions_in_other_buckets_and_sums_give_the_same_gradients(gangs, hf_models):
    fields = "{bucket_size: 3000, reduce_scatter_with_fp32_accumulation: true}", "{pad_buckets_for_high_nccl_busbw: true}"
    overrides = ["parallel.tp=1", "train.distributed_optimizer=true", "train.overlap_grad_reduce=true"]
    job = {"model": hf_models["qwen3"], "sequences": random_sequences(), "overrides": overrides, "fields": list(fields)}
    for plain, cut, padded in gangs(2).run("tests.megatron_field_jobs:updates", **job):
        for other in (cut, padded):
            assert_same_update(other, plain)
        assert len(plain["buckets"]) == 1 < len(cut["buckets"])
        assert plain["buckets"][0] % 2**16 != 0 == padded["buckets"][0] % 2**16
        assert [one["sums_itself"] for one in (plain, cut, padded)] == [False, True, False]


def test_every_field_of_megatron_is_either_passed_on_or_refused_for_a_reason():
    ours = [*FIELDS, *GOVERNED, *REFUSED]
    assert set(ours) == {field.name for owner in OWNERS.values() for field in dataclasses.fields(owner)}
    assert len(set(ours)) == len(ours)
    keys = {f"{section}.{key}" for section, values in dataclasses.asdict(Config()).items() for key in values}
    for name, key in GOVERNED.items():
        assert key in keys or key.removeprefix("train.megatron.") in FIELDS, name


def plain_types(hint: Any) -> set[Any]:
    """bool, int and texts among the types of an annotation, and the types in its lists."""
    if hint is AttnBackend:
        return {"flash", "fused", "unfused", "auto", "local"}
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {hint} | {one for part in get_args(hint) for one in plain_types(part)}


def test_a_field_has_the_type_that_it_has_in_megatron():
    for name, field in FIELDS.items():
        known = plain_types(get_type_hints(OWNERS[field.of])[name])
        if name == "recompute_modules":  # a list of any texts there
            assert known >= {str}
        else:
            assert plain_types(field.hint) <= known, name


def refused(*overrides: str) -> list[str]:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(None, [f"train.megatron.{one}" if "." not in one.split("=")[0] else one for one in overrides])
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tensor_model_parallel_size=2", " = 2 (command line): follows from parallel.tp; set that instead"),
        ("moe_layer_recompute=true", "follows from train.megatron.recompute_modules; set that instead"),
        ("use_precision_aware_optimizer=true", "follows from train.optimizer_offload; set that instead"),
        ("hidden_size=64", "follows from the model's config.json; remove it"),
        ("hidden_dropout=0.1", "would change what is computed, so that the trainer and the servers had different models"),
        ("calculate_per_token_loss=false", "is set by this project, which relies on its value; remove it"),
        ("tp_comm_overlap=true", "needs microbatches of one size, and packed ones have many; remove it"),
        ("exp_avg_dtype=bf16", "types that checkpoints have not been shown to keep; remove it"),
        ("moe_permut_fusion=true", "Megatron has no field of this name; did you mean moe_permute_fusion or"),
        ("=1", "train.megatron. = 1 (command line): Megatron has no field of this name; docs/config.md lists"),
        ("deallocate_pipeline_outputs=1", "must be true or false"),
        ("attention_backend=fast", 'must be one of "auto", "flash", "fused", "unfused"'),
        ("moe_token_dispatcher_type=allgather", 'must be one of "alltoall", "flex"'),
        ("recompute_modules=[mlp]", "has no effect without train.megatron.recompute_granularity=selective; set that as well"),
        ("cpu_offloading_num_layers=2", "has no effect without train.megatron.cpu_offloading=true; set that as well"),
        ("cpu_offloading=true", "moves nothing without train.megatron.cpu_offloading_num_layers; set that as well"),
        ("moe_hybridep_num_sms=8", "has no effect without train.megatron.moe_flex_dispatcher_backend=hybridep; set that"),
        ("bucket_size=1000", "the field has no effect with this train.overlap_grad_reduce; change that, or remove the field"),
        ("clone_scatter_output_in_embedding=false", "parallel.sequence_parallel = false (default): the field has no effect"),
        ("overlap_p2p_comm_warmup_flush=true", "parallel.vpp = 1 (default): the field has no effect"),
        ("deallocate_pipeline_outputs=true", "parallel.pp = 1 (default): the field has no effect"),
        ("disable_parameter_transpose_cache=true", 'fp8.recipe = "none" (default): the field has no effect'),
    ],
)
def test_a_field_that_cannot_be_set_or_has_another_type_is_refused_in_one_sentence(override, sentence):
    (problem,) = refused(override)
    assert f"train.megatron.{override.split('=')[0]} = " in problem and sentence in problem


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("recompute_num_layers=true", "must be a whole number"),
        ("recompute_num_layers=0", "must be at least 1 and below 2**31"),
        ("recompute_modules=[mlp, x]", "must be a list of some of core_attn, mlp, moe, moe_act"),
        ("recompute_modules=mlp", "must be a list of some of"),
        ("recompute_modules=[]", "must be a list of some of"),
    ],
)
def test_a_value_of_another_type_is_refused(value, sentence):
    granularity = "selective" if "modules" in value else "full"
    (problem,) = refused(f"recompute_granularity={granularity}", value)
    assert sentence in problem


def test_what_contradicts_another_key_is_refused():
    (problem,) = refused("disable_bf16_reduced_precision_matmul=true", "model.dtype=float32")
    assert 'model.dtype = "float32" (command line): the field has no effect with this model.dtype' in problem
    flex = ["moe_token_dispatcher_type=flex", "moe_flex_dispatcher_backend=hybridep", "moe_hybridep_num_sms=8"]
    (problem,) = refused(*flex, "moe_deepep_num_sms=24")
    assert "DeepEP's number has no effect on HybridEP; remove it, or set moe_hybridep_num_sms" in problem
    (problem,) = refused("recompute_granularity=selective", "train.recompute=full")
    assert "both choose what is recomputed; set recompute to none, or remove Megatron's fields for it" in problem
    (problem,) = refused("deallocate_pipeline_outputs=true", "parallel.pp=2", "parallel.vpp=2")
    assert "parallel.vpp = 2 (command line): with several chunks per stage, Megatron frees outputs that it is still" in problem
    (problem,) = refused("moe_router_fusion=true", "train.routing_replay=true", "rollout.backend=sglang")
    assert "Megatron's fused router cannot be told which experts to choose" in problem
    overlapped = ["train.overlap_grad_reduce=true", "train.distributed_optimizer=true", "model.dtype=bfloat16"]
    sums = ["reduce_scatter_with_fp32_accumulation=true", *overlapped, "fp8.recipe=blockwise"]
    (problem,) = refused(*sums, "fp8.param=true")
    assert "fp8.param = true (command line), train.overlap_grad_reduce = true (command line): Megatron reduces" in problem
    load_config(None, [f"train.megatron.{sums[0]}", *sums[1:]])


@pytest.mark.parametrize(
    ("field", "needs"),
    [
        (dict(moe_permute_fusion=True), True),
        (dict(moe_permute_fusion=False), False),
        (dict(moe_token_dispatcher_type="flex"), True),
        (dict(moe_token_dispatcher_type="alltoall"), False),
        (dict(recompute_granularity="selective", recompute_modules=("mlp", "moe_act")), True),
        (dict(recompute_granularity="selective", recompute_modules=("mlp",)), False),
    ],
)
def test_a_field_that_needs_a_gpu_is_refused_without_one(field, needs):
    config = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, megatron=field))
    resolve(config, 1, cuda=True)
    if not needs:
        resolve(config, 1, cuda=False)
        return
    with pytest.raises(InvalidConfigError, match=r"needs a GPU and Transformer Engine, and this job runs on CPU; remove it"):
        resolve(config, 1, cuda=False)


def test_an_override_sets_one_entry_and_keeps_those_of_the_file(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("train:\n  megatron: {recompute_granularity: full, recompute_method: block, recompute_num_layers: 2}\n")
    block = {"recompute_granularity": "full", "recompute_method": "block"}
    config = load_config(path, ["train.megatron.recompute_num_layers=3", "train.megatron.recompute_num_layers=5"])
    assert config.train.megatron == {**block, "recompute_num_layers": 5}
    (problem,) = refused_in(path, "train.megatron.recompute_num_layers=0", "train.megatron.hidden_size=1")[:1]
    assert problem.startswith("  - train.megatron.recompute_num_layers = 0 (command line): must be at least 1")
    kept, added = refused_in(path, "train.megatron.recompute_granularity=selective", "train.megatron.bucket_size=0")[1:]
    assert f"recompute_num_layers = 2 ({path}:2): has no effect" in kept and "bucket_size = 0 (command line)" in added
    (problem,) = refused_in(path, "train.recompute=full")
    assert f'train.megatron.recompute_granularity = "full" ({path}:2), train.recompute' in problem
    config = load_config(path, ["train.megatron.recompute_num_layers=3", "train.megatron={}"])
    assert config.train.megatron == {}


def refused_in(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()[1:]


def test_a_run_keeps_its_fields_in_its_config(tmp_path: Path):
    config = load_config(None, ["train.megatron={recompute_granularity: selective, recompute_modules: [mlp, layernorm]}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert validate(config, 1) == []


def configured(model: str, *overrides: str, world: int = 1, cuda: bool = True) -> Config:
    return resolve(load_config(None, [f"model.path={model}", "data.max_prompt_tokens=64", *overrides]), world, cuda=cuda)


def test_megatrons_own_complaint_is_one_sentence_before_anything_starts(hf_models):
    with pytest.raises(UserError) as caught:
        check_model(configured(hf_models["qwen3"], *FULL, "parallel.tp=1", cuda=False), 1)
    said = str(caught.value)
    assert said.startswith(
        'train.megatron = {"recompute_granularity": "full", "recompute_method": "block"}: Megatron refuses it: '
    )
    assert "recompute_num_layers must be between 1 and" in said and said.endswith("; change or remove a field")
    config = configured(hf_models["qwen3"], *FULL, "train.megatron.recompute_num_layers=1", "parallel.tp=1", cuda=False)
    check_fields.check_fields(read_architecture(hf_models["qwen3"]), config)


def test_every_rank_says_it_too(gangs, hf_models):
    job = {"model": hf_models["qwen3"], "overrides": [*FULL, "parallel.tp=2"]}
    said = gangs(2).run("tests.megatron_field_jobs:refusal", **job)
    assert said[0] == said[1] and "Megatron refuses it" in said[0]


def test_a_launch_with_a_field_that_megatron_refuses_ends_with_2_and_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(launch, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    assert launch.main([str(REPO / "configs" / "cpu_tiny.yaml"), *FULL]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train.megatron = {") and said.count("\n") == 1


def test_an_assertion_without_a_text_is_told_by_its_line():
    told = pytest.raises(UserError, match="Megatron refuses it: raise AssertionError; change or remove a field")
    with told, complaints_about({"a": 1}):
        raise AssertionError
    with pytest.raises(AssertionError), complaints_about({}):
        raise AssertionError


@pytest.mark.parametrize(
    ("model", "field", "sentence"),
    [
        ("qwen3", "moe_permute_fusion=true", "m has no experts, so train.megatron.moe_permute_fusion has no effect; remove it"),
        ("qwen3", parts("mlp", "moe"), "m has no experts, so moe in train.megatron.recompute_modules has no effect; remove it"),
        (
            "qwen3_moe",
            "moe_shared_expert_overlap=true",
            "m has no shared expert, so train.megatron.moe_shared_expert_overlap",
        ),
        ("qwen3_moe", parts("moe", "shared_experts"), "m has no shared expert, so shared_experts in train.megatron.recompute_"),
        ("qwen3_moe", parts("moe", "mlp"), "m has no layer without experts, so mlp in train.megatron.recompute_modules has no"),
        ("deepseek_v3", parts("moe", "shared_experts", "mlp"), None),
    ],
)
def test_fields_for_parts_that_a_model_does_not_have_are_refused(hf_models, model, field, sentence):
    config = configured(hf_models[model], f"train.megatron{'=' if field[0] == '{' else '.'}{field}", "parallel.tp=1")
    if sentence is None:
        check_architecture("m", read_architecture(hf_models[model]), config, 1)
        return
    with pytest.raises(UserError) as caught:
        check_architecture("m", read_architecture(hf_models[model]), config, 1)
    assert sentence in str(caught.value)


FLEX = "train.megatron.moe_token_dispatcher_type=flex"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "every rank has all experts of m; set parallel.ep above 1"),
        (["parallel.ep=2"], "flex needs routing weights in float32; set train.moe_router_fp32 to true"),
        (["parallel.ep=2", "train.moe_router_fp32=true"], None),
    ],
)
def test_deepep_is_refused_where_it_cannot_work(hf_models, overrides, sentence):
    config = configured(hf_models["qwen3_moe"], FLEX, "parallel.tp=1", *overrides, world=2)
    arch = read_architecture(hf_models["qwen3_moe"])
    if sentence is None:
        check_architecture("m", arch, config, 1)
        return
    with pytest.raises(UserError) as caught:
        check_architecture("m", arch, config, 1)
    assert sentence in str(caught.value)


def test_what_a_machine_lacks_for_a_field_is_said_before_anything_starts(hf_models, monkeypatch):
    arch = read_architecture(hf_models["qwen3_moe"])
    config = configured(hf_models["qwen3_moe"], FLEX, "parallel.tp=1", "parallel.ep=2", world=2)
    monkeypatch.setattr(check_fields.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flex needs the package deep_ep, which is not installed"):
        check_fields.check_fields(arch, config)
    monkeypatch.setattr(check_fields.importlib.util, "find_spec", lambda name: name)
    config = configured(hf_models["qwen3"], f"train.megatron={parts('mlp', 'layernorm')}", "parallel.tp=1")
    with pytest.raises(UserError, match=r"norms together with linear layers, so layernorm in train\.megatron\.recompute"):
        check_fields.check_fields(read_architecture(hf_models["qwen3"]), config)
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    config = configured("tiny", "train.megatron.deterministic_mode=true", "parallel.tp=1")
    with pytest.raises(UserError, match="needs the environment variable NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 on every node"):
        check_model(config, 1)
    check_server_node(config, 1)  # which has no ranks


def test_fields_reach_the_config_of_megatron_that_has_them():
    given = {"attention_backend": "flash", "recompute_modules": ("mlp", "moe"), "bucket_size": 7, "pin_cpu_grads": False}
    assert fields_of("model", given) == {"attention_backend": AttnBackend.flash, "recompute_modules": ["mlp", "moe"]}
    assert fields_of("ddp", given) == {"bucket_size": 7}
    train = dataclasses.replace(Config().train, megatron=given)
    config = dataclasses.replace(Config(), train=train, model=dataclasses.replace(Config().model, dtype="float32"))
    assert not optimizer_config(config).pin_cpu_grads and OptimizerConfig().pin_cpu_grads


def test_what_a_dispatcher_keeps_through_its_backend_is_forgotten_too():
    model, kept = torch.nn.Module(), torch.ones(3, requires_grad=True) * 2
    model.token_dispatcher = type("Flex", (), {})()
    model.token_dispatcher._comm_manager = type("Manager", (), {})()
    model.token_dispatcher._comm_manager.token_probs = model.token_dispatcher.probs = kept
    model.token_dispatcher._comm_manager.num_experts = 5
    forget_routing(model)
    assert vars(model.token_dispatcher._comm_manager) == {"token_probs": None, "num_experts": 5}
    assert model.token_dispatcher.probs is None


def test_the_reference_lists_the_fields():
    text = (REPO / "docs" / "config.md").read_text()
    assert all(f"| `{name}` | " in text for name in FIELDS)
    assert json.dumps("Literal['block', 'uniform']")[1:-1] in text
