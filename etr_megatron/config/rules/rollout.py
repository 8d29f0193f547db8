"""Rules about sampling and servers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from etr_megatron.config.defaults import EVALUATED, response_limits
from etr_megatron.config.rules.violation import Violation
from etr_megatron.config.schema import Config, SglangConfig


def rollout(config: Config) -> Iterator[Violation]:
    """Sampling."""
    rollout = config.rollout
    if rollout.samples_per_prompt < 2:
        yield Violation(
            ("rollout.samples_per_prompt",),
            "must be at least 2: the advantage compares the responses to one prompt, and is 0 for a single one",
        )
    for key, top_p in (("rollout.top_p", rollout.top_p), ("eval.top_p", config.eval.top_p)):
        if not 0 < top_p <= 1:
            yield Violation((key,), "must be greater than 0 and at most 1")
    if config.eval.max_response_tokens is not None and config.eval.max_response_tokens < 1:
        yield Violation(("eval.max_response_tokens",), "must be at least 1; null is rollout.max_response_tokens")
    if rollout.max_logprob_gap is not None and rollout.max_logprob_gap <= 0:
        yield Violation(("rollout.max_logprob_gap",), "must be greater than 0; null takes the default of the dtype")
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
        yield Violation(("rollout.max_oversample",), "must be at least 1, which asks for no more than prompts_per_step")
    for key, is_on in (("partial", rollout.partial), ("max_staleness", rollout.max_staleness > 0)):
        if is_on and rollout.backend == "embedded":
            yield Violation(
                (f"rollout.{key}", "rollout.backend"),
                "the embedded engine lives in the ranks that train, and can be neither cut off nor run beside them; set "
                "backend to sglang",
            )
    if rollout.partial and rollout.max_staleness < 1:
        yield Violation(
            ("rollout.partial", "rollout.max_staleness"),
            "a response that goes on after a weight sync has tokens of older weights; set max_staleness to at least 1",
        )


def recorded(config: Config) -> Iterator[Violation]:
    """Replay of recorded steps, and rollouts without training."""
    rollout = config.rollout
    if rollout.replay == "":
        yield Violation(("rollout.replay",), "must not be empty; null is off")
    if rollout.replay is not None and config.eval.every:
        yield Violation(("rollout.replay", "eval.every"), "there is no engine to evaluate with; set eval.every to 0")
    if rollout.replay is not None and rollout.only:
        yield Violation(("rollout.replay", "rollout.only"), "what is replayed is recorded already; leave out one of them")


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
    "--skip-tokenizer-init": None,
    "--enable-memory-saver": "sglang.placement",
    "--dp-size": None,
    "--data-parallel-size": None,
    "--pp-size": None,
    "--pipeline-parallel-size": None,
    "--nnodes": "sglang.nodes",
    "--node-rank": None,
    "--dist-init-addr": None,
    "--nccl-init-addr": None,
}
"""Server arguments on which the job and its weight sync rely -> the key that sets them."""

_MOVES_EXPERTS = ("--enable-eplb", "--init-expert-location", "--ep-num-redundant-experts")
"""Arguments that place experts by other than their index, possibly without changing parameter shapes."""


def sglang(config: Config) -> Iterator[Violation]:
    """Servers."""
    sglang = config.sglang
    if any(not re.match(r"https?://[^/]+", url) for url in sglang.urls):
        yield Violation(("sglang.urls",), "every server's address must be http://host:port")
    if len(set(sglang.urls)) < len(sglang.urls):
        yield Violation(("sglang.urls",), "must not name a server twice")
    if sglang.devices and len(sglang.devices) != sglang.gpus_of_a_node:
        yield Violation(
            ("sglang.devices", "sglang.servers", "sglang.tp"),
            f"{sglang.servers} servers of tp {sglang.tp} take {sglang.gpus_of_a_node} GPUs",
        )
    if sglang.ep >= 1 and sglang.tp % sglang.ep:
        yield Violation(("sglang.ep", "sglang.tp"), "ep must divide tp, whose ranks the experts are spread over")
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
                    f"servers refuse a prompt with a response of together {longest} tokens, which the other two allow",
                    given=("sglang.urls", *EVALUATED),
                )
    yield from _placement(sglang)
    if sglang.placement == "colocated" and config.rollout.max_staleness:
        yield Violation(
            ("sglang.placement", "rollout.max_staleness"),
            "colocated servers generate and train by turns; set max_staleness to 0, or give the servers GPUs of their own",
        )
    if sglang.router is not None and config.train.routing_replay:
        yield Violation(
            ("sglang.router", "train.routing_replay"),
            "sglang-router (0.3.2) does not pass on to servers that their experts are asked for; leave out one of them",
        )
    yield from _arguments(sglang)


def _placement(sglang: SglangConfig) -> Iterator[Violation]:
    external = bool(sglang.urls)
    if sglang.placement is not None and external != (sglang.placement == "external"):
        what = "servers that run already are external" if external else "external servers are named by sglang.urls"
        yield Violation(("sglang.placement", "sglang.urls"), what)
    if external and sglang.nodes == "every":
        yield Violation(("sglang.nodes", "sglang.urls"), "servers that run already are on the nodes where they are")
    if sglang.dedicated_nodes > 0:
        yield from _dedicated_nodes(sglang)
    if external and sglang.router is not None:
        yield Violation(("sglang.router", "sglang.urls"), "the job's router is for servers that the job started")
    if external and sglang.sync == "sharded":
        yield Violation(("sglang.sync", "sglang.urls"), "sharded needs servers that the job started with its weight loader")
    if sglang.checksums and sglang.sync != "sharded":
        yield Violation(("sglang.checksums", "sglang.sync"), "only servers of sync: sharded can be asked for checksums")
    if sglang.placement == "colocated" and sglang.sync in ("broadcast", "sharded"):
        yield Violation(
            ("sglang.sync", "sglang.placement"),
            "colocated servers take tensor or disk: NCCL has no group with two processes on one GPU",
        )


def _dedicated_nodes(sglang: SglangConfig) -> Iterator[Violation]:
    if sglang.urls:
        yield Violation(("sglang.dedicated_nodes", "sglang.urls"), "servers that run already are on the nodes where they are")
    elif sglang.placement == "colocated":
        yield Violation(("sglang.dedicated_nodes", "sglang.placement"), "nodes set apart have no ranks to share GPUs with")
    if sglang.nodes == "every":
        yield Violation(("sglang.dedicated_nodes", "sglang.nodes"), "servers are on nodes of their own or on every node")
    if sglang.sync == "tensor":
        yield Violation(
            ("sglang.dedicated_nodes", "sglang.sync"),
            "tensor needs a rank on the servers' machine; take broadcast, sharded or disk",
        )


def _arguments(sglang: SglangConfig) -> Iterator[Violation]:
    typed = {"--mem-fraction-static": "mem_fraction", "--context-length": "context_length"}
    for argument in sglang.arguments:
        name = argument.split("=", 1)[0]
        if name in SET_BY_THE_JOB:
            key = SET_BY_THE_JOB[name]
            yield Violation(("sglang.arguments",), f"{name} is set by the job" + (f", see {key}" if key else ""))
        elif name in typed and getattr(sglang, typed[name]) is not None:
            yield Violation(("sglang.arguments", f"sglang.{typed[name]}"), f"{name} is given twice")
        elif name in _MOVES_EXPERTS and sglang.sync == "sharded":
            yield Violation(
                ("sglang.arguments", "sglang.sync"),
                f"{name} puts experts elsewhere than sharded writes them; use broadcast, tensor or disk",
            )
