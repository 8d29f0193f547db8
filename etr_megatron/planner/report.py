"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from etr_megatron.planner.advice import Suggestion
from etr_megatron.planner.memory import GIB, RankMemory, usable
from etr_megatron.planner.plan import Plan
from etr_megatron.planner.recompute import uncounted


def render(plan: Plan, advice: Sequence[Suggestion] = ()) -> str:
    """Cluster, memory by stage, whether it fits, seconds of a step."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_verdict(plan, advice), "", *_time(plan)])


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / GIB:.1f}"


def misfit(plan: Plan) -> str:
    """Why a plan does not fit, as part of a sentence; "" if it fits."""
    found = []
    if not plan.ranks_fit:
        found.append(f"rank {plan.tightest.rank} needs {gib(plan.tightest.peak)} of {gib(usable(plan.gpu_memory))} usable GiB")
    if not plan.server_fits:
        found.append(f"a server's {_server_misfit(plan)}")
    return ", and ".join(found)


def _server_misfit(plan: Plan) -> str:
    """Why servers do not fit, after "a server's"."""
    if plan.server_holds_sample:
        parts = f"pool of {gib(plan.server.pool)} and CUDA graphs of {gib(plan.server.graphs)} GiB, with its process,"
        return f"{parts} take {gib(plan.server.peak)} of {gib(usable(plan.gpu_memory))} usable GiB; lower sglang.mem_fraction"
    pool = f"weights take {gib(plan.server.weights)} of a pool of {gib(plan.server.pool)} GiB"
    return f"{pool}, and the rest does not hold one sample of {plan.work.longest:,} tokens"


def _head(plan: Plan) -> Iterator[str]:
    parallel, cluster, work = plan.config.parallel, plan.cluster, plan.work
    replicas = cluster.ranks // (int(parallel.tp) * parallel.pp * parallel.cp)
    sizes = {"TP": parallel.tp, "PP": parallel.pp, "VPP": parallel.vpp, "CP": parallel.cp, "EP": parallel.ep}
    cut = " x ".join(f"{name}{size}" for name, size in sizes.items() if size != 1 or name == "TP") + f" x DP{replicas}"
    yield f"model      {plan.config.model.path}, {plan.parameters:,} parameters, {plan.arch.layers} layers"
    if plan.adapters:
        yield f"adapters   {_adapters(plan)}"
    first = "" if cluster.first_node_ranks is None else f", the first with {cluster.first_node_ranks}"
    apart = cluster.dedicated_nodes
    train = f"{cluster.nodes} nodes with" if not apart else f"{cluster.nodes} nodes, {apart} for servers alone, the others with"
    nodes = f"{train} {cluster.ranks_per_node} ranks{first}"
    yield f"GPUs       {cluster.gpus} of {plan.gpu_memory:g} GiB; {nodes}"
    yield f"training   {cluster.ranks} ranks: {cut}"
    if plan.config.rollout.backend == "embedded":
        yield "rollout    the embedded engine in every rank"
    else:
        where = "outside" if cluster.outside else "on the ranks' GPUs" if cluster.colocated else "on GPUs of their own"
        spread = f" on {cluster.nodes_per_server} nodes" if cluster.nodes_per_server > 1 else ""
        spread += f" with attention of DP{plan.server.caches}" if plan.server.caches > 1 else ""
        yield (
            f"rollout    {cluster.servers} servers of TP{cluster.server_tp}{spread}, {where}; KV cache of each: "
            f"{plan.server.cache_tokens:,} tokens, {plan.cache_samples} of the longest samples"
        )
    if unused := cluster.dedicated_nodes * (cluster.gpus_per_node - plan.config.sglang.gpus_of_a_node):
        yield f"           {unused} GPUs of the nodes for servers are unused: see sglang.servers, tp and nodes_per_server"
    if plan.config.rollout.replay is not None:
        yield "           (planned as if rollouts were generated; rollout.replay needs neither this memory nor this time)"
    yield (
        f"a step     {work.samples:,} samples of {work.prompt:,.0f} + {work.response:,.0f} tokens on average (assumed unless "
        f"given), {work.longest:,} at most"
    )
    yield f"           microbatches of at most {work.microbatch_tokens:,} tokens, {work.microbatches} a rank and optimizer step"
    if names := uncounted(plan.config.train):
        yield f"           (planned as if without these fields of train.megatron, which are not counted: {', '.join(names)})"
    if plan.snapshot_on_host:
        yield f"checkpoint its copy takes {gib(plan.snapshot_on_host)} GiB of a node's memory until it is written"


def _adapters(plan: Plan) -> str:
    lora = plan.config.lora
    experts = "" if lora.expert_rank is None else f", of experts {lora.expert_rank}"
    share = f"{plan.adapters:,} elements, {plan.adapters / plan.parameters:.2%} of the model's"
    where = f"; original values: {gib(plan.base_on_host)} GiB of a node's memory" if lora.offload_base else ""
    return f"rank {lora.rank}{experts}: {share}{where}"


def _memory(plan: Plan) -> Iterator[str]:
    columns = ["parameters", "gradients", "optimizer", "reference", "base", "activations", "head", "projected", "export"]
    columns += ["server", "graphs", "embedded", "cache"]
    shown = [name for name in columns if any(getattr(rank, name) for rank in plan.ranks)]
    stages: dict[int, RankMemory] = {}
    for rank in plan.ranks:
        if rank.stage not in stages or rank.peak > stages[rank.stage].peak:
            stages[rank.stage] = rank
    names = ["stage", "elements", *shown, *plan.tightest.phases]
    rows = [
        [
            str(stage),
            f"{rank.elements:,}",
            *(gib(getattr(rank, name)) for name in shown),
            *(gib(peak) for peak in rank.phases.values()),
        ]
        for stage, rank in sorted(stages.items())
    ]
    yield "GiB of the tightest rank of a stage, and peaks of its phases:"
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
    for row in [names, *rows]:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _verdict(plan: Plan, advice: Sequence[Suggestion]) -> Iterator[str]:
    rank, room = plan.tightest, usable(plan.gpu_memory)
    phase = max(rank.phases, key=lambda name: rank.phases[name])
    words = "fits" if plan.fits else "ranks fit" if plan.ranks_fit else "DOES NOT FIT"
    yield f"{words}: rank {rank.rank} (stage {rank.stage}) needs {gib(rank.peak)} of {gib(room)} usable GiB, to {phase}"
    if not plan.server_fits:
        yield f"servers DO NOT FIT: {_server_misfit(plan)}"
    if plan.fits and advice:
        yield "would also fit, and may be faster:"
    for suggestion in advice:
        least = "" if suggestion.is_counted else "at least "
        end = f"fits, {least}{suggestion.step:.0f} s a step" if suggestion.fits else "does not fit"
        yield f"  {suggestion.setting}: {gib(suggestion.peak)} GiB, {end}"


def _time(plan: Plan) -> Iterator[str]:
    if not plan.server_holds_sample:
        yield "no estimate of a step: servers without room for a sample generate nothing"
        return
    time, unless = plan.time, "" if plan.fits else ", if it fit"
    yield f"estimate of a step on {plan.gpu.name}{unless} (assumptions: docs/planner.md):"
    yield f"  generate   {time.generate:8.1f} s"
    yield f"  log-probs  {time.logprobs:8.1f} s"
    adapters = f"; {time.adapters:.1f} s of log-probs and train for adapters" if time.adapters else ""
    yield f"  train      {time.train:8.1f} s, pipeline bubble {time.bubble:.1%}{adapters}"
    yield f"  sync       {time.sync:8.1f} s"
    how = "generation beside training" if time.overlapped else "one after the other"
    if plan.config.train.optimizer_offload:
        how += ", the optimizer's update on the CPU not counted"
    yield f"  step       {time.step:8.1f} s, {how}; {time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
