"""Check a job's inputs in one process, before any rank is started.

Every check raises UserError, which names the key, its value and the fix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from etr_megatron.check_fields import (
    check_dispatcher,
    check_fields,
    check_fields_without_dense_layers,
    check_fields_without_experts,
    check_fields_without_shared_expert,
)
from etr_megatron.check_functions import check_functions
from etr_megatron.config import (
    Config,
    ParallelConfig,
    Source,
    response_limits,
    sources_of,
    sync_of,
    tensor_parallel,
)
from etr_megatron.errors import UserError
from etr_megatron.observe import RunDirectory, require_wandb
from etr_megatron.platform.files import refuse_all
from etr_megatron.platform.world import server_node_index
from etr_megatron.sglang_support import check_sglang_support
from etr_megatron.types import MAX_REPLAYED_EXPERTS, TOKENIZER_FILES

if TYPE_CHECKING:
    from etr_megatron.weights import Architecture, Experts


def check_inputs(config: Config, world_size: int) -> None:
    """Check the model, data, the user's functions, servers, run directory and recorded run that `config` names.

    Weights are checked by their headers, data is read in full. Raises one `UserError` with every problem found.
    """
    refuse_all(
        lambda: check_model(config, world_size),
        lambda: check_problems(sources_of(config.data), config),
        lambda: check_functions(config),
        lambda: check_servers(config),
        lambda: check_directory(config),
        lambda: require_wandb(config),
        lambda: check_replay(config, config.run.steps),
    )


def check_server_node(config: Config, world_size: int) -> None:
    """Check the inputs of a dedicated server node: servers need the model and their own environment.

    The run directory is not checked, because the run may be in progress when a server node restarts. world_size: number of
    training ranks.
    """
    refuse_all(lambda: check_model(config, world_size, trains=False), lambda: check_servers(config))


def check_model(config: Config, world_size: int, *, trains: bool = True) -> None:
    """Check that the checkpoint is complete, of a supported architecture, and fits the parallel layout. trains: whether this
    node has ranks, which need what `train.megatron` asks of a machine."""
    name = config.model.path
    tp = tensor_parallel(config.parallel, world_size)
    if name == "tiny":
        tiny = config.tiny
        check_attention("the tiny model", tiny.heads, tiny.heads // 2, tiny.head_dim, tp, config.parallel)
        check_layers("the tiny model", tiny.layers, config.parallel)
        check_mlp("the tiny model", tiny.intermediate_size, tp)
        check_without_experts("the tiny model", config)
        if config.lora.rank or config.train.megatron:
            from etr_megatron.weights import tiny_architecture

            check_adapters(tiny_architecture(tiny), config)
            if trains:
                check_fields(tiny_architecture(tiny), config)
        return
    architecture = check_description(config)
    from etr_megatron.weights import check_checkpoint

    model = f"the model in {name}"
    check_architecture(model, architecture, config, tp)
    if trains:
        check_fields(architecture, config)
    if config.rollout.backend == "sglang" and config.rollout.replay is None:
        try:
            check_sglang_support(model, architecture, config.sglang)
        except ValueError as error:
            raise UserError(f"a server cannot split {model}: {error}") from None
    check_checkpoint(name, values=True)
    check_context(architecture, config)
    check_tokenizer_files(config)


def check_description(config: Config) -> Architecture:
    """Check that the model directory, other than `tiny`, exists and that its config.json describes a supported architecture;
    returns the architecture."""
    name = config.model.path
    if not Path(name).is_dir():
        raise UserError(
            f"model.path: {name} is not a directory; give a HuggingFace checkpoint (Llama 3, Mistral, Qwen2/2.5, Qwen3, "
            "Qwen3-MoE, GLM-4.5, GLM-4.7-Flash or DeepSeek-V3), a directory written by tools/convert_hf.py, or tiny"
        )
    from etr_megatron.weights import read_architecture

    return read_architecture(name)


def check_tokenizer_files(config: Config) -> None:
    """Check that the model directory has a tokenizer."""
    name = config.model.path
    if not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"model.path: {name} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy its tokenizer files there"
        )


def check_architecture(model: str, architecture: Architecture, config: Config, tp: int) -> None:
    """Check that the model fits the parallel layout and `lora.targets`, and that MoE options are not set for a dense model."""
    parallel = config.parallel
    check_attention(model, architecture.heads, architecture.kv_heads, architecture.head_dim, tp, parallel)
    if architecture.value_dim != architecture.head_dim and parallel.cp > 1 and parallel.cp_comm == "a2a":
        raise UserError(
            f"{model} has values of {architecture.value_dim} dimensions and keys of {architecture.head_dim}, for which "
            "Transformer Engine does not have parallel.cp_comm=a2a; set parallel.cp_comm to p2p"
        )
    check_layers(model, architecture.layers, parallel)
    check_experts(model, architecture.experts, parallel, tp)
    if architecture.experts is None:
        check_without_experts(model, config)
    else:
        check_routing(model, architecture.experts, config)
    if architecture.has_dense_layers:
        check_mlp(model, architecture.intermediate_size, tp)
    check_adapters(architecture, config)


def check_adapters(architecture: Architecture, config: Config) -> None:
    """Check that the model has the layers that `lora.targets` names, and that every pipeline stage has some of them."""
    from etr_megatron.weights import LowRank, TrainingLayout

    if low_rank := LowRank.of(config.lora):
        parallel = config.parallel
        first, last = parallel.first_stage_layers, parallel.last_stage_layers
        layout = TrainingLayout(pp=parallel.pp, vpp=parallel.vpp, first_stage_layers=first, last_stage_layers=last)
        low_rank.refuse_untrained(architecture, layout)


def check_context(architecture: Architecture, config: Config) -> None:
    """Check that the longest sample fits in the model's context. (The config's rules do this for the tiny model.)"""
    model, prompt = config.model.path, config.data.max_prompt_tokens
    for key, response in response_limits(config).items():
        if model != "tiny" and architecture.max_positions < prompt + response:
            raise UserError(
                f"{model} has a context of {architecture.max_positions} tokens (max_position_embeddings), fewer than "
                f"data.max_prompt_tokens={prompt} plus {key}={response}; lower one of them"
            )


def check_attention(model: str, heads: int, kv_heads: int, head_dim: int, tp: int, parallel: ParallelConfig) -> None:
    """Check that attention splits over `tp`. With more ranks than key/value heads, neighboring ranks share a head."""
    if heads % tp:
        raise UserError(
            f"{model} has {heads} attention heads, which parallel.tp={tp} does not divide; choose a parallel.tp that "
            f"divides {heads}"
        )
    if kv_heads % tp and tp % kv_heads:
        raise UserError(
            f"{model} has {kv_heads} key/value heads, of which parallel.tp={tp} is neither a divisor nor a multiple; choose a "
            "parallel.tp that is"
        )
    if 2 * kv_heads * head_dim % tp:
        raise UserError(
            f"{model} has {2 * kv_heads * head_dim} rows of keys and values, which parallel.tp={tp} does not divide; choose a "
            "smaller parallel.tp"
        )
    held = max(1, kv_heads // tp)
    if parallel.cp_comm == "a2a" and held % parallel.cp:
        raise UserError(
            f"{model} has {held} key/value heads on each of parallel.tp={tp} ranks, which parallel.cp={parallel.cp} must "
            "divide for parallel.cp_comm=a2a; set parallel.cp_comm to p2p"
        )


def check_layers(model: str, layers: int, parallel: ParallelConfig) -> None:
    """Check that layers split over pipeline stages and chunks. The vocabulary needs no check because it is padded."""
    if parallel.vpp > 1 or (parallel.first_stage_layers, parallel.last_stage_layers) != (None, None):
        check_stages(model, layers, parallel)
    elif layers % parallel.pp:
        raise UserError(
            f"{model} has {layers} layers, which parallel.pp={parallel.pp} does not divide; choose a parallel.pp that divides "
            f"{layers}, or set parallel.first_stage_layers and parallel.last_stage_layers"
        )


def check_mlp(model: str, width: int, tp: int) -> None:
    """Check that the gated MLP of a dense layer splits over `tp`."""
    if width % tp:
        raise UserError(
            f"{model} has MLPs of width {width} (intermediate_size), which parallel.tp={tp} does not divide; choose a "
            "parallel.tp that does"
        )


def check_stages(model: str, layers: int, parallel: ParallelConfig) -> None:
    """Check that layers divide into stages of `parallel.vpp` chunks, given the sizes set for the first and last stages."""
    from etr_megatron.weights import TrainingLayout

    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    layout = TrainingLayout(pp=parallel.pp, vpp=parallel.vpp, first_stage_layers=first, last_stage_layers=last)
    try:
        layout.layers_of_stages(layers)
    except ValueError:
        uneven = "".join(
            f", with parallel.{name}_stage_layers={count}" for name, count in (("first", first), ("last", last)) if count
        )
        raise UserError(
            f"{model} has {layers} layers, which do not divide into parallel.pp={parallel.pp} stages of parallel.vpp="
            f"{parallel.vpp} equal chunks{uneven}; every stage needs a multiple of parallel.vpp"
        ) from None


def check_experts(model: str, experts: Experts | None, parallel: ParallelConfig, tp: int) -> None:
    """Check that experts split over `parallel.ep`, each expert over `parallel.etp`, and a shared expert over `tp`. tp: the
    resolved `parallel.tp`."""
    ep, etp = parallel.ep, tp if parallel.etp is None else parallel.etp
    if experts is None:
        if ep > 1:
            raise UserError(f"{model} has no experts to spread over parallel.ep={ep}; set parallel.ep to 1")
        return
    if experts.count % ep:
        raise UserError(
            f"{model} has {experts.count} experts, which parallel.ep={ep} does not divide; choose a parallel.ep that divides "
            f"{experts.count}"
        )
    if experts.intermediate_size % etp:
        raise UserError(
            f"{model} has experts of width {experts.intermediate_size}, which parallel.etp={etp} does not divide (null is "
            f"parallel.tp={tp}); choose a parallel.etp that divides {experts.intermediate_size}"
        )
    if experts.shared_size % tp:
        raise UserError(
            f"{model} has a shared expert of width {experts.shared_size}, which parallel.tp={tp} does not divide; choose a "
            "parallel.tp that does"
        )
    if tp > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"{model} has experts, which need parallel.sequence_parallel=true with parallel.tp={tp}; set that, or parallel.tp "
            "to 1"
        )


def check_routing(model: str, experts: Experts, config: Config) -> None:
    """Refuse options of the routers that do not fit the model's experts."""
    check_dispatcher(model, experts, config)
    if not experts.dense_layers:
        check_fields_without_dense_layers(model, config)
    if not experts.shared_size:
        check_fields_without_shared_expert(model, config)
    if config.train.routing_replay and experts.count > MAX_REPLAYED_EXPERTS:
        raise UserError(
            f"{model} has {experts.count} experts, more than the {MAX_REPLAYED_EXPERTS} that train.routing_replay "
            "supports; set it to false"
        )
    if config.train.moe_aux_loss_coef and experts.expert_bias:
        # Megatron computes this loss from the experts that would be chosen without the biases.
        raise UserError(
            f"{model} balances its experts by a bias per expert, which train.moe_aux_loss_coef would work against; set it to 0"
        )


def check_without_experts(model: str, config: Config) -> None:
    """Refuse MoE options, which would have no effect on a dense model."""
    check_fields_without_experts(model, config)
    if config.train.moe_aux_loss_coef:
        raise UserError(f"{model} has no experts, so train.moe_aux_loss_coef has no effect; set it to 0")
    if config.train.moe_router_fp32:
        raise UserError(f"{model} has no experts, so train.moe_router_fp32 has no effect; set it to false")
    if config.train.moe_freeze_router:
        raise UserError(f"{model} has no experts, so train.moe_freeze_router has no effect; set it to false")
    if config.train.routing_replay:
        raise UserError(f"{model} has no experts, so train.routing_replay has no effect; set it to false")
    if config.parallel.etp is not None:
        raise UserError(f"{model} has no experts to split over parallel.etp={config.parallel.etp}; set it to null")
    if config.lora.expert_rank is not None:
        raise UserError(f"{model} has no experts, so lora.expert_rank has no effect; set it to null")


def check_problems(sources: Iterable[Source], config: Config) -> None:
    """Check these sources, see `check_source`, and the tokenizer, see `check_tokenizer`. If all training sets are among the
    sources, also check that they have enough problems for a step, and values in every one of `reward.columns`."""
    from etr_megatron.data import check_tokenizer, refuse_columns_of_no_set

    usable: dict[Source, tuple[int, list[str]]] = {}

    def look(source: Source) -> None:
        usable[source] = check_source(source, config)

    refuse_all(*(partial(look, source) for source in sources), partial(check_tokenizer, config))
    train = [source for source in sources_of(config.data) if source.split == "train"]
    if not usable.keys() >= set(train):
        return
    refuse_columns_of_no_set({source.name: usable[source][1] for source in train if source.name}, config.reward.columns)
    needed = config.rollout.prompts_per_step
    if (found := sum(usable[source][0] for source in train)) < needed:
        raise UserError(
            f"data.train has {found} problem{'s' * (found != 1)}, fewer than a step needs; lower "
            f"rollout.prompts_per_step={needed} or give more data"
        )


def check_source(source: Source, config: Config) -> tuple[int, list[str]]:
    """Check that every row can be used, or skipped under `data.on_bad_row`; returns the result of `usable_rows`. Fetches a hub
    dataset, so that the ranks find it in the cache."""
    from etr_megatron.data import usable_rows

    return usable_rows(source, config.data, config.arithmetic, config.reward.columns)


def check_directory(config: Config) -> None:
    """Check that the run directory is writable, that a run can be started or resumed there under `checkpoint.resume`, and that
    it is not the replayed run."""
    directory = RunDirectory(Path(config.run.dir) / config.run.name)
    if config.rollout.replay is not None and os.path.realpath(config.rollout.replay) == os.path.realpath(directory.root):
        raise UserError(f"{directory.root} is the run in rollout.replay and would be overwritten; choose another run.name")
    directory.refuse_if_unwritable()
    directory.refuse_if_used(config.checkpoint.resume, only_records=config.rollout.only)


def check_replay(config: Config, steps: int) -> None:
    """Check that the recorded run has `steps` steps (0: any), matches the config, and shows no damage in a quick check."""
    rollout = config.rollout
    if rollout.replay is None:
        return
    from etr_megatron.rollout.record import RECORDED
    from etr_megatron.rollout.replayable import survey

    folder = Path(rollout.replay) / RECORDED
    if problems := survey(folder, steps, config):
        raise UserError("\n".join(f"rollout.replay: {problem}" for problem in problems))


def dedicated_nodes(config: Config) -> int:
    """Number of dedicated server nodes, which have no training ranks."""
    return config.sglang.dedicated_nodes if has_servers(config) else 0


def nodes_per_server(config: Config) -> int:
    """Number of nodes that each server spans, if every node runs a part of a server. Else 1: for dedicated nodes, the config's
    rules check the number."""
    return config.sglang.nodes_per_server if has_servers(config) and config.sglang.nodes == "every" else 1


def has_servers(config: Config) -> bool:
    """Whether the job starts servers of its own."""
    return config.rollout.backend == "sglang" and config.rollout.replay is None and not config.sglang.urls


def starts_servers(config: Config) -> bool:
    """Whether this node starts servers; without torchrun it counts as the first node."""
    if not has_servers(config):
        return False
    if dedicated := dedicated_nodes(config):
        return server_node_index(dedicated) is not None
    return config.sglang.nodes == "every" or os.environ.get("GROUP_RANK", "0") == "0"


def syncs_over_process_groups(config: Config) -> bool:
    """Whether weight syncs use process groups of training ranks and servers. On GPUs these use NCCL."""
    engine = config.rollout.backend == "sglang" and config.rollout.replay is None
    return engine and sync_of(config.sglang) in ("broadcast", "sharded")


def check_servers(config: Config) -> None:
    """Check the interpreter and the arguments of the servers that this node starts."""
    if not starts_servers(config):
        return
    from etr_megatron.rollout.sglang.arguments import check_arguments, require_interpreter

    require_interpreter(config.sglang.python)
    check_arguments(config.sglang)
