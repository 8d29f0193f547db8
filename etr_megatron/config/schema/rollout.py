"""Sampling and the servers that do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    backend: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: a transformers replica in every rank. `sglang`: SGLang servers, see `sglang.*`."""
    prompts_per_step: int = 16
    """Prompts (groups) per step."""
    samples_per_prompt: int = 8
    """Responses per group."""
    max_response_tokens: int = 256
    """Token limit of a response, with the replies of an environment; generation stops there with finish reason `length`."""
    temperature: float = 1.0
    """Sampling temperature; the policy's log-probs are computed at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling. Log-probs are still those of the full distribution."""
    top_k: int = 0
    """Top-k sampling; 0 is off."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens, by their text, that end a response, also in evaluations, besides the end-of-sequence tokens of the tokenizer and
    generation_config.json: `["<|im_end|>"]`, for a base model that is prompted by a chat template. They stay in the response;
    the reward function sees those that are not special tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn of the model, also in evaluations: `["</search>"]`. They need not begin or end at token boundaries.
    The response keeps the text, and the whole token in which it ends."""
    batch_samples: int = 64
    """Responses that the embedded engine decodes together. Batches are formed before they are spread over ranks, so results do
    not depend on the layout."""
    max_logprob_gap: float | None = None
    """Gate at the first step: the largest mean gap allowed between the engine's and the trainer's log-probs. null is 1e-4 in
    float32, 5e-2 in bfloat16, and 0.2 if `sglang.fp8` or `fp8.recipe` makes servers or trainer compute in FP8."""
    dynamic_sampling: bool = False
    """Leave out groups whose rewards are all equal, and replace them by other prompts, up to `max_oversample`. At that limit,
    the step is filled up with groups that were left out."""
    max_oversample: float = 1.5
    """Limit on the prompts of a step, as a multiple of `prompts_per_step`. `dynamic_sampling` requests no replacements beyond
    it; `partial` keeps this many groups pending."""
    partial: bool = False
    """Begin training when `prompts_per_step` groups are complete. Responses still in flight are cut off at the next weight sync
    (before training if servers are colocated) and continued after it; each token keeps its own log-prob and weight version.
    Needs `max_staleness` of 1 or more."""
    max_staleness: int = 0
    """Largest age of a token that is trained on, in weight syncs. 0: a step generates, then trains. 1: the responses of a step
    are generated while the previous step trains; needs servers. Colocated servers only continue `partial` responses."""
    record: bool = False
    """Write all groups of every step, with tokens and log-probs, to `<run>/recorded/`."""
    replay: str | None = None
    """Run directory whose recorded groups are trained on, step by step, instead of new ones. There is then no engine."""
    only: bool = False
    """Record rollouts and rewards under the newest checkpoint's weights, without training. Set by `--rollout-only`."""


@dataclass(frozen=True)
class SglangConfig:
    """Servers of `rollout.backend: sglang`."""

    urls: tuple[str, ...] = ()
    """Servers that already run the policy's model (`http://host:port`). Without any, the job starts its own."""
    servers: int = 1
    """Servers that the job starts on a node; they end with the job."""
    placement: Literal["dedicated", "colocated", "external"] | None = None
    """`dedicated`: servers have their own GPUs. `colocated`: they share the ranks' GPUs and release memory while the policy
    trains. `external`: they already run, at `sglang.urls`. null is `external` with `sglang.urls`, else `dedicated`."""
    nodes: Literal["first", "every"] = "first"
    """Nodes with servers: `first` is rank 0's node; with `every`, each node has `sglang.servers`."""
    dedicated_nodes: int = 0
    """Nodes for servers alone: the last ones of torchrun's nodes, with `sglang.servers` each and no ranks. 0: servers are on
    nodes that train, see `nodes`."""
    nodes_per_server: int = 1
    """Nodes that each server spans, for a model that the GPUs of one node do not hold: consecutive nodes, with the same number
    of its `tp` GPUs on each. Above 1 it needs `nodes: every` or `dedicated_nodes`, and `servers: 1`."""
    tp: int = 1
    """Tensor parallel size of each server."""
    ep: int = 1
    """Expert parallel size of each server; must divide `sglang.tp`."""
    dp_attention: int = 1
    """Data-parallel size of each server's attention; must divide `sglang.tp`. Each of these groups of GPUs attends for requests
    of its own and caches only their keys and values. With latent attention, whose cache tensor parallelism does not split, `tp`
    is usual. 1: every GPU takes part in all requests."""
    mem_fraction: float | None = None
    """Fraction of a GPU's memory for weights and KV cache; null is SGLang's default."""
    context_length: int | None = None
    """Maximum tokens of a prompt and its response together; null is the model's context length."""
    fp8: bool = False
    """Serve matrices in FP8 with 128 x 128 blocks; every weight sync quantises them."""
    devices: tuple[str, ...] = ()
    """GPUs of the servers on a node, in order, `tp / nodes_per_server` for each server. By default, colocated servers take the
    ranks' GPUs from the first on, and dedicated servers take the GPUs after the ranks'."""
    python: str = ".venv-sglang/bin/python"
    """Python of the environment that has SGLang; `bash tools/setup_env.sh --sglang` creates the default one."""
    launch: tuple[str, ...] = ("-m", "sglang.launch_server")
    """Arguments of `sglang.python` that start a server."""
    arguments: tuple[str, ...] = ()
    """Further SGLang arguments, such as `--attention-backend,fa3`; unknown names are refused."""
    router: Literal["cache_aware", "power_of_two", "round_robin", "random"] | None = None
    """Policy of SGLang's router (`sglang-router`), which the job then starts in front of its servers. `cache_aware`: all
    responses to a prompt come from one server, where it is cached. null: no router; the job chooses."""
    router_launch: tuple[str, ...] = ("-m", "sglang_router.launch_router")
    """Arguments of `sglang.python` that start the router."""
    host: str | None = None
    """Address of rank 0's machine as the servers see it; weights are sent from there. null is loopback, or an address that
    servers on other machines can reach."""
    sync: Literal["broadcast", "tensor", "disk", "sharded"] | None = None
    """How weights reach the servers: `broadcast` (whole tensors over a process group), `tensor` (whole tensors in shared
    memory; as HTTP text to servers at `urls`), `disk` (files in `sglang.sync_dir`) or `sharded` (each rank sends each worker
    what it needs, once). null is `tensor` for colocated servers, else `broadcast`."""
    sync_dir: str | None = None
    """Directory for `sync: disk`, which all ranks and servers must see; null is `servers/weights` in the run directory."""
    checksums: bool = False
    """With `sync: sharded`, compare all weights in the servers with their source after each sync. This reads all weights twice
    more."""
    probe_every: int = 100
    """Weight syncs between probes, the first sync included; 0 is never. In a probe, each server generates a few tokens, whose
    log-probs must match the trainer's within ten times `rollout.max_logprob_gap` (at most 2 nats if that allows less)."""
    concurrency: int = 128
    """Maximum requests in flight per server."""
    bucket_mib: int = 512
    """Size of a weight sync's buckets. The files of `disk` have 1 GiB."""
    startup_timeout_s: float | None = None
    """Deadline of a server's start, until it answers. null is 900, and 2400 with `fp8`: on a GPU, the first start on a machine
    compiles DeepGEMM's kernels."""
    request_timeout_s: float | None = None
    """If a server that has requests (with a router: all servers) completes no response for this time, it has failed. So this
    must exceed the generation of one response, but not the wait in the queue. One response may take ten times as long. null is
    the time of the longest response at 10 tokens per second (`rollout.max_response_tokens`, `eval.max_response_tokens`), but
    at least 1800."""
    hang_timeout_s: float = 120.0
    """Time without a sign of life, while responses are in flight, after which a server counts as hung. A busy server answers
    between two batches, so this must exceed its longest batch."""
    update_timeout_s: float = 300.0
    """Deadline of every request and wait of a weight sync."""

    @property
    def gpus_of_a_node(self) -> int:
        """Number of GPUs that the servers of a node take."""
        return self.servers * self.tp_on_a_node

    @property
    def tp_on_a_node(self) -> int:
        """Number of a server's tensor-parallel ranks on each of its nodes."""
        return self.tp // self.nodes_per_server
