"""Rules about sampling and servers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from etr_megatron.config.defaults import EVALUATED, response_limits
from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config, SglangConfig

MAX_STOP_STRINGS = 32
"""Maximum number of stop strings in a request (`sampling/sampling_params.py` of SGLang 0.5.21)."""


def rollout(config: Config) -> Iterator[Violation]:
    """Sampling."""
    rollout = config.rollout
    if rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt",),
            "must be at least 2: the advantage compares responses to the same prompt, and is 0 for a single one",
        )
    for key, top_p in (("rollout.top_p", rollout.top_p), ("eval.top_p", config.eval.top_p)):
        if not 0 < top_p <= 1:
            yield Violation((key,), "must be greater than 0 and at most 1")
    if config.eval.max_response_tokens is not None and config.eval.max_response_tokens < 1:
        yield Violation(("eval.max_response_tokens",), "must be at least 1, or null for rollout.max_response_tokens")
    if "" in rollout.stop_strings or len(set(rollout.stop_strings)) < len(rollout.stop_strings):
        yield Violation(("rollout.stop_strings",), "must be different texts, none of them empty")
    if rollout.backend == "sglang" and len(rollout.stop_strings) > MAX_STOP_STRINGS:
        yield Violation(
            ("rollout.stop_strings", "rollout.backend"), f"SGLang (0.5.21) takes at most {MAX_STOP_STRINGS} texts; name fewer"
        )
    if rollout.max_logprob_gap is not None and rollout.max_logprob_gap <= 0:
        yield Violation(("rollout.max_logprob_gap",), "must be greater than 0, or null for the default of the dtype")
    updates = config.train.minibatches
    if updates >= 1 and rollout.prompts_per_step % updates:
        yield Violation(
            ("rollout.prompts_per_step", "train.minibatches"),
            "prompts_per_step must be divisible by minibatches, as minibatches are made of whole groups",
        )


def asynchronous(config: Config) -> Iterator[Violation]:
    """Oversampling, responses that outlive a step, and generation that overlaps with training."""
    rollout = config.rollout
    if rollout.max_oversample < 1:
        yield Violation(("rollout.max_oversample",), "must be at least 1, which means no oversampling")
    for key, is_on in (("partial", rollout.partial), ("max_staleness", rollout.max_staleness > 0)):
        if is_on and rollout.backend == "embedded":
            yield Violation(
                (f"rollout.{key}", "rollout.backend"),
                "the embedded engine runs in the training ranks, so it can be neither interrupted nor run during training; "
                "set backend to sglang",
            )
    if rollout.partial and rollout.max_staleness < 1:
        yield Violation(
            ("rollout.partial", "rollout.max_staleness"),
            "a response that continues after a weight sync has tokens from older weights; set max_staleness to at least 1",
        )


def recorded(config: Config) -> Iterator[Violation]:
    """Replay of recorded steps, and rollouts without training."""
    rollout = config.rollout
    if rollout.replay == "":
        yield Violation(("rollout.replay",), "must not be empty; use null to disable replay")
    if rollout.replay is not None and config.eval.every:
        yield Violation(("rollout.replay", "eval.every"), "a replay has no engine to evaluate with; set eval.every to 0")
    if rollout.replay is not None and rollout.only:
        yield Violation(
            ("rollout.replay", "rollout.only"),
            "replayed rollouts are already recorded; remove one of the two settings",
        )


SET_BY_THE_JOB = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--dtype": "model.dtype",
    "--tp-size": "sglang.tp",
    "--tensor-parallel-size": "sglang.tp",
    "--ep-size": "sglang.ep",
    "--expert-parallel-size": "sglang.ep",
    "--ep": "sglang.ep",
    "--quantization": "sglang.fp8",
    "--host": None,
    "--port": None,
    "--weight-version": None,
    "--api-key": None,
    "--admin-api-key": None,
    "--config": None,
    "--load-format": None,
    "--custom-weight-loader": None,
    "--skip-tokenizer-init": "rollout.stop_strings",
    "--enable-memory-saver": "sglang.placement",
    "--dp-size": "sglang.dp_attention",
    "--data-parallel-size": "sglang.dp_attention",
    "--enable-dp-attention": "sglang.dp_attention",
    "--pp-size": None,
    "--pipeline-parallel-size": None,
    "--nnodes": "sglang.nodes_per_server",
    "--node-rank": None,
    "--dist-init-addr": None,
    "--nccl-init-addr": None,
}
"""Server arguments on which the job and its weight sync rely -> the key that sets them."""

_MOVES_EXPERTS = ("--enable-eplb", "--init-expert-location", "--ep-num-redundant-experts")
"""Arguments with which experts are not placed by their index; parameter shapes may be the same."""

_DP_HEAD = "--enable-dp-lm-head"
_SPLITS_OTHERWISE = (_DP_HEAD, "--moe-dense-tp-size")
"""Arguments for attention in parallel with which the head or the dense MLPs are split in fewer parts."""


def sglang(config: Config) -> Iterator[Violation]:
    """Servers."""
    sglang = config.sglang
    if any(not re.match(r"https?://[^/]+", url) for url in sglang.urls):
        yield Violation(("sglang.urls",), "every URL must have the form http://host:port")
    if len(set(sglang.urls)) < len(sglang.urls):
        yield Violation(("sglang.urls",), "must not list a server twice")
    yield from _devices(sglang)
    if sglang.ep >= 1 and sglang.tp % sglang.ep:
        yield Violation(("sglang.ep", "sglang.tp"), "ep must divide tp, as experts are spread over the tp ranks of a server")
    if sglang.dp_attention >= 1 and sglang.tp % sglang.dp_attention:
        yield Violation(
            ("sglang.dp_attention", "sglang.tp"),
            "dp_attention must divide tp, as the tp ranks of a server form this many groups for attention",
        )
    if sglang.mem_fraction is not None and not 0 < sglang.mem_fraction < 1:
        yield Violation(("sglang.mem_fraction",), "must lie between 0 and 1")
    if sglang.context_length is not None and sglang.context_length < 1:
        yield Violation(("sglang.context_length",), "must be at least 1")
    elif sglang.context_length is not None and not sglang.urls:
        for key, tokens in response_limits(config).items():
            longest = config.data.max_prompt_tokens + tokens
            if sglang.context_length < longest:
                yield Violation(
                    ("sglang.context_length", "data.max_prompt_tokens", key),
                    f"a prompt and its response can have {longest} tokens together, which servers would refuse; raise "
                    "context_length, or lower one of the other two",
                    given=("sglang.urls", *EVALUATED),
                )
    yield from _placement(sglang)
    if sglang.placement == "colocated" and config.rollout.max_staleness and not config.rollout.partial:
        yield Violation(
            ("sglang.placement", "rollout.max_staleness", "rollout.partial"),
            "colocated servers and training take turns on the GPUs, so only interrupted responses can have older tokens; set "
            "max_staleness to 0, partial to true, or placement to dedicated",
        )
    if sglang.router is not None and config.train.routing_replay:
        yield Violation(
            ("sglang.router", "train.routing_replay"),
            "sglang-router (0.3.2) does not forward the request for expert choices to servers; set router to null, or "
            "routing_replay to false",
        )
    yield from _arguments(sglang)


def _devices(sglang: SglangConfig) -> Iterator[Violation]:
    span = sglang.nodes_per_server
    if not sglang.devices or span < 1 or sglang.tp % span or len(sglang.devices) == sglang.gpus_of_a_node:
        return
    spread = f" on {span} nodes" if span > 1 else ""
    yield Violation(
        ("sglang.devices", "sglang.servers", "sglang.tp", *(["sglang.nodes_per_server"] if span > 1 else [])),
        f"{sglang.servers} servers of tp {sglang.tp}{spread} need {sglang.gpus_of_a_node} GPUs{' of each' * (span > 1)}; list "
        "as many devices",
        given=("sglang.nodes_per_server",),
    )


def _placement(sglang: SglangConfig) -> Iterator[Violation]:
    external = bool(sglang.urls)
    if sglang.placement is not None and external != (sglang.placement == "external"):
        missing = "external servers need their addresses in sglang.urls"
        what = "servers at sglang.urls are external; set placement to external or null" if external else missing
        yield Violation(("sglang.placement", "sglang.urls"), what)
    if external and sglang.nodes == "every":
        yield Violation(("sglang.nodes", "sglang.urls"), "the job does not place servers at sglang.urls; set nodes to first")
    if sglang.dedicated_nodes > 0:
        yield from _dedicated_nodes(sglang)
    if sglang.nodes_per_server > 1:
        yield from _nodes_per_server(sglang)
    if external and sglang.router is not None:
        yield Violation(
            ("sglang.router", "sglang.urls"),
            "the job starts a router only for servers that it also starts; set router to null",
        )
    if external and sglang.sync == "sharded":
        yield Violation(
            ("sglang.sync", "sglang.urls"),
            "sharded needs servers that the job starts with its weight loader; set sync to broadcast, tensor or disk",
        )
    if sglang.checksums and sglang.sync != "sharded":
        yield Violation(
            ("sglang.checksums", "sglang.sync"),
            "checksums need sync to be sharded; set sync to sharded, or checksums to false",
        )
    if sglang.placement == "colocated" and sglang.sync in ("broadcast", "sharded"):
        yield Violation(
            ("sglang.sync", "sglang.placement"),
            "NCCL does not allow two processes of a group on one GPU; set sync to tensor or disk for colocated servers",
        )


def _dedicated_nodes(sglang: SglangConfig) -> Iterator[Violation]:
    if sglang.urls:
        yield Violation(
            ("sglang.dedicated_nodes", "sglang.urls"), "the job does not place servers at sglang.urls; set dedicated_nodes to 0"
        )
    elif sglang.placement == "colocated":
        yield Violation(
            ("sglang.dedicated_nodes", "sglang.placement"),
            "dedicated nodes have no ranks to share GPUs with; set placement to dedicated, or dedicated_nodes to 0",
        )
    if sglang.nodes == "every":
        yield Violation(
            ("sglang.dedicated_nodes", "sglang.nodes"),
            "servers are either on dedicated nodes or on every node; set nodes to first, or dedicated_nodes to 0",
        )
    if sglang.sync == "tensor":
        yield Violation(
            ("sglang.dedicated_nodes", "sglang.sync"),
            "tensor needs a rank on the servers' machine; set sync to broadcast, sharded or disk",
        )


def _nodes_per_server(sglang: SglangConfig) -> Iterator[Violation]:
    span, key = sglang.nodes_per_server, "sglang.nodes_per_server"
    if sglang.urls:
        yield Violation((key, "sglang.urls"), "the job does not start servers at sglang.urls; set nodes_per_server to 1")
        return
    if sglang.nodes == "first" and sglang.dedicated_nodes < 1:
        yield Violation(
            (key, "sglang.nodes", "sglang.dedicated_nodes"),
            "a server on the first node alone spans no others; set nodes to every, dedicated_nodes to a multiple of "
            "nodes_per_server, or nodes_per_server to 1",
            given=("sglang.urls",),
        )
    if sglang.servers > 1:
        yield Violation(
            (key, "sglang.servers"),
            "a server that spans nodes is the only one on them; set servers to 1, or nodes_per_server to 1",
            given=("sglang.urls",),
        )
    if sglang.tp % span:
        yield Violation(
            (key, "sglang.tp"),
            "nodes_per_server must divide tp, as each node of a server has the same number of its GPUs",
            given=("sglang.urls",),
        )
    if sglang.dedicated_nodes % span:
        yield Violation(
            (key, "sglang.dedicated_nodes"),
            "dedicated_nodes must be divisible by nodes_per_server, as every node belongs to one server",
            given=("sglang.urls",),
        )
    if sglang.placement == "colocated" and sglang.mem_fraction is None:
        yield Violation(
            (key, "sglang.placement", "sglang.mem_fraction"),
            "a colocated server starts again with the fraction that SGLang chose, which it reports from its first node alone; "
            "set mem_fraction",
            given=("sglang.urls",),
        )


def _arguments(sglang: SglangConfig) -> Iterator[Violation]:
    typed = {"--mem-fraction-static": "mem_fraction", "--context-length": "context_length"}
    for argument in sglang.arguments:
        name = argument.split("=", 1)[0]
        if name in SET_BY_THE_JOB:
            key = SET_BY_THE_JOB[name]
            yield Violation(("sglang.arguments",), f"{name} is set by the job" + (f", see {key}" if key else ""))
        elif name in typed and getattr(sglang, typed[name]) is not None:
            yield Violation(("sglang.arguments", f"sglang.{typed[name]}"), f"{name} is given twice; remove one of the two")
        elif name.startswith("--speculative-"):
            yield Violation(
                ("sglang.arguments",),
                f"{name} is not supported: weight syncs send no weights of a draft model or of MTP layers; remove it",
            )
        elif name in _MOVES_EXPERTS and sglang.sync == "sharded":
            yield Violation(
                ("sglang.arguments", "sglang.sync"),
                f"{name} moves experts away from where sharded writes them; set sync to broadcast, tensor or disk",
            )
        elif name in _SPLITS_OTHERWISE and sglang.sync == "sharded":
            yield Violation(
                ("sglang.arguments", "sglang.sync"),
                f"with {name} a server splits weights otherwise than sharded sends them; set sync to broadcast, tensor or disk",
            )
        if name == _DP_HEAD and sglang.dp_attention == 1:
            yield Violation(
                ("sglang.arguments", "sglang.dp_attention"),
                f"{name} splits the head over a group's GPUs; set dp_attention above 1, or remove it",
            )
