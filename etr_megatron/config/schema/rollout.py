"""Sampling and the servers that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    backend: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: a transformers replica in every rank. `sglang`: servers, see `sglang.*`."""
    prompts_per_step: int = 16
    """Groups in a step."""
    samples_per_prompt: int = 8
    """Responses per group."""
    max_response_tokens: int = 256
    """Generation stops here with finish reason `length`."""
    temperature: float = 1.0
    """Of the sampling and of the policy's log-probs alike."""
    top_p: float = 1.0
    """Nucleus sampling; log-probs stay those of the full distribution."""
    top_k: int = 0
    """0 is off."""
    batch_samples: int = 64
    """Responses that the embedded engine decodes together; batches are cut before they are spread over ranks, so that
    results do not depend on the layout."""
    max_logprob_gap: float | None = None
    """Gate at the first step: largest mean gap between the engine's and the trainer's log-probs; null is 1e-4 in
    float32 and 5e-2 in bfloat16."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, and ask for other prompts in their place, within `max_oversample`; when
    that is used up, a step is filled with those left out."""
    max_oversample: float = 1.5
    """Prompts asked for in a step at most, in `prompts_per_step`: what `dynamic_sampling` may ask for again, and what
    `partial` has under way."""
    partial: bool = False
    """A step begins to train when `prompts_per_step` groups are complete; responses still under way are cut off at the next
    weight sync and go on from there, each token with its own log-prob and weight version. Needs `max_staleness` 1 or more."""
    max_staleness: int = 0
    """Largest age of a token that is trained on, in weight syncs. 0: a step generates, then trains. 1: the responses of a step
    are generated while the step before it trains; needs servers."""
    record: bool = False
    """Keep all groups of every step, with tokens and log-probs, in `<run>/recorded/`."""
    replay: str | None = None
    """Run directory whose recorded groups are trained on, step by step, instead of new ones; there is no engine then."""
    only: bool = False
    """Rollouts and rewards alone, recorded, from the newest checkpoint's weights: what `--rollout-only` sets."""


@dataclass(frozen=True)
class SglangConfig:
    """Servers of `rollout.backend: sglang`."""

    urls: tuple[str, ...] = ()
    """Servers that run already (`http://host:port`) with the policy's model; none: the job starts its own."""
    servers: int = 1
    """Servers that the job starts on a node; they end with it."""
    placement: Literal["dedicated", "colocated", "external"] | None = None
    """`dedicated`: servers have GPUs of their own. `colocated`: they share the ranks' GPUs and give up their memory while the
    policy is trained. `external`: they run already, at `sglang.urls`. null: `external` with `sglang.urls`, else `dedicated`."""
    nodes: Literal["first", "every"] = "first"
    """Which nodes have servers: the one of rank 0, or `every` one, `sglang.servers` each."""
    dedicated_nodes: int = 0
    """Nodes that are set apart for servers, `sglang.servers` each: the last ones of torchrun's, which have no ranks. 0: servers
    are on nodes that train, see `nodes`."""
    tp: int = 1
    """Tensor parallel size of each server."""
    ep: int = 1
    """Expert parallel size of each server; divides `sglang.tp`."""
    mem_fraction: float | None = None
    """Part of a GPU's memory for weights and KV cache; null is SGLang's choice."""
    context_length: int | None = None
    """Most tokens of a prompt with its response; null is the model's."""
    fp8: bool = False
    """Servers hold their matrices as FP8 in blocks of 128 x 128, quantised by every weight sync."""
    devices: tuple[str, ...] = ()
    """GPUs of the servers that the job starts on a node, `tp` each in order. None: colocated servers lie side by side on the
    ranks' GPUs from the first on, dedicated ones on those behind the ranks'."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang; `bash tools/setup_env.sh --sglang` makes this one."""
    launch: tuple[str, ...] = ("-m", "sglang.launch_server")
    """What that interpreter runs."""
    arguments: tuple[str, ...] = ()
    """SGLang's own further arguments, such as `--attention-backend,fa3`; their names are compared with what the server has."""
    router: Literal["cache_aware", "power_of_two", "round_robin", "random"] | None = None
    """Policy of a router, `sglang-router`, that the job starts before its servers and generates by way of. `cache_aware`: the
    responses to a prompt come from one server, where it is cached. null: there is none, the least busy server is asked."""
    router_launch: tuple[str, ...] = ("-m", "sglang_router.launch_router")
    """What `sglang.python` runs as the router."""
    host: str | None = None
    """Address of rank 0's machine as the servers see it; weights are sent from there. null: loopback, or where servers are
    on other machines the address on the way to them."""
    sync: Literal["broadcast", "tensor", "disk", "sharded"] | None = None
    """How weights reach the servers. `broadcast`: whole tensors over one process group. `tensor`: the same in shared memory of
    the servers' machines, and in HTTP requests to those at `urls`. `disk`: by way of `sglang.sync_dir`. `sharded`: every rank
    sends each worker what that needs, once. null: `broadcast`, for colocated servers `tensor`."""
    sync_dir: str | None = None
    """Directory of `sync: disk` that all ranks and servers see; null is `servers/weights` in the run's directory."""
    checksums: bool = False
    """With `sync: sharded`, compare every piece of every tensor, as it lies in a server, with its source after each sync; all
    weights are read twice more."""
    probe_every: int = 100
    """At the first weight sync and every so many, servers must give their own tokens the trainer's log-probs, within
    `rollout.max_logprob_gap`; 0 is never."""
    concurrency: int = 128
    """Requests under way per server."""
    bucket_mib: int = 512
    """Size of the pieces that a weight sync travels in; the files of `disk` have 1 GiB."""
    startup_timeout_s: float = 900.0
    """Deadline for a server to answer after its start."""
    request_timeout_s: float = 1800.0
    """Deadline of one response."""
    hang_timeout_s: float = 120.0
    """For a server to say that it lives while responses are under way, which a busy one does between two batches."""
    update_timeout_s: float = 300.0
    """Deadline of every request and wait of a weight sync."""

    @property
    def gpus_of_a_node(self) -> int:
        """That the servers of one node take."""
        return self.servers * self.tp
