"""What can be configured: one frozen dataclass per room, a docstring under each field. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = "run"
    """Name of the run; its directory is `<dir>/<name>`."""
    dir: str = "runs"
    """Parent of all run directories."""
    seed: int = 1
    """Seeds data order, sampling and initialisation."""
    steps: int = 100
    """Rollout steps; each holds `train.epochs * train.minibatches` optimizer steps."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a device."""
    phase_timeout_s: float = 1800.0
    """Deadline, in seconds, of every collective and of every rank's arrival at a phase; the latter's error names who is
    missing."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Directory of a HuggingFace checkpoint (Llama 3, Qwen2/2.5, Qwen3, Qwen3-MoE) or of what `tools/convert_hf.py to-megatron`
    wrote, or `tiny`: a small Qwen3 made and warm-started here."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Parameter type; `auto` is float32 on CPU and bfloat16 on CUDA."""


@dataclass(frozen=True)
class TinyConfig:
    """The generated policy of `model.path: tiny` and its supervised warm start."""

    hidden_size: int = 64
    """Width of the residual stream."""
    layers: int = 3
    """Transformer layers."""
    heads: int = 4
    """Attention heads; key/value heads are half as many."""
    head_dim: int = 24
    """Width of one head; need not be `hidden_size / heads`."""
    intermediate_size: int = 192
    """Width of the gated MLP."""
    vocab_size: int = 320
    """Largest size of the byte-level BPE vocabulary (special tokens and 256 bytes included)."""
    warm_start_steps: int = 700
    """Supervised optimizer steps on generated problems; fewer leave more for RL to do."""
    warm_start_batch: int = 64
    """Sequences in a supervised step."""
    warm_start_lr: float = 3e-3
    """Peak learning rate of the warm start (cosine to zero)."""
    forgotten_carry: float = 0.65
    """Share of carries and borrows that the demonstrations forget: a mistake that the warm start teaches and RL has to
    mend; above 0.5 greedy decoding makes it too."""
    wrong_digit: float = 0.0
    """Share of columns whose result the demonstrations write one off."""
    warm_start_seed: int = 0
    """Apart from `run.seed`, so that several RL seeds share one start."""
    cache_dir: str = ".cache"
    """Where finished warm starts are kept, keyed by these settings."""


@dataclass(frozen=True)
class ArithmeticConfig:
    """Generated arithmetic (`data.train: arithmetic`): what the tiny policy is warm-started on and then trained on by RL."""

    min_digits: int = 3
    """Fewest digits of an operand."""
    max_digits: int = 3
    """Most digits of an operand."""
    operators: tuple[str, ...] = ("+",)
    """Which of `+`, `-`, `*` occur; differences are never negative, and `*` has a one-digit second operand."""
    train_problems: int = 4096
    """Problems for RL."""
    eval_problems: int = 128
    """Held-out problems, disjoint from RL and warm start."""
    seed: int = 0
    """Seeds the generator, apart from `run.seed`."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts and reference answers."""

    train: str = "arithmetic"
    """`arithmetic`, a .jsonl or .parquet file, or the name of a hub dataset (`name` or `name:config`)."""
    train_split: str = "train"
    """Split, for hub datasets."""
    eval: str | None = "arithmetic"
    """Held-out problems, named like `train`; null for none."""
    eval_split: str = "test"
    """Split of `eval`, for hub datasets."""
    prompt_column: str = "question"
    """Column with the problem's text."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    id_column: str | None = None
    """Column with a stable id; without it `<file>:<line>`."""
    prompt_template: str = "{prompt}"
    """Wrapped around the problem's text before the chat template."""
    system_prompt: str | None = None
    """System message, for chat templates."""
    chat_template: bool = True
    """Apply the tokenizer's chat template when it has one."""
    max_prompt_tokens: int = 1024
    """Longer prompts are skipped and counted."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that cannot be read: stop with its file and line, or skip and count it."""
    shuffle: bool = True
    """New order every epoch, from `run.seed`."""


@dataclass(frozen=True)
class RewardConfig:
    """The verifier."""

    function: str = "math"
    """`math` (math-verify), or `package.module:function` of your own: `f(prompt, response, answer) -> float`."""
    extract: tuple[str, ...] = ("boxed", "hash", "last_number")
    """Where the answer is looked for, first hit wins: `\\boxed{}`, after `####`, the last number."""
    range_min: float = 0.0
    """Lowest reward the function can give; with `range_max` it normalises the group variance."""
    range_max: float = 1.0
    """Highest reward the function can give."""
    workers: int = 2
    """Grader processes."""
    timeout_s: float = 10.0
    """Wall-clock limit per answer; a stuck grader is killed and replaced, and the answer counted as a timeout."""
    overlong_buffer: int = 0
    """DAPO's overlong punishment: over the last so many tokens before `rollout.max_response_tokens` the trained reward falls
    linearly by `overlong_penalty`; 0 is off. The group variance stays the verifier's."""
    overlong_penalty: float = 1.0
    """What a response of `rollout.max_response_tokens` loses to the overlong punishment."""


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


@dataclass(frozen=True)
class SglangConfig:
    """Servers of `rollout.backend: sglang`."""

    urls: tuple[str, ...] = ()
    """Servers that run already (`http://host:port`) with the policy's model; none: the job starts its own."""
    servers: int = 1
    """Servers that the job starts, on rank 0's machine; they end with it."""
    tp: int = 1
    """Tensor parallel size of each server."""
    devices: tuple[str, ...] = ()
    """GPUs of the servers that the job starts, `tp` each in order, apart from the ranks' own; none on CPU."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang; `bash tools/setup_env.sh --sglang` makes this one."""
    launch: tuple[str, ...] = ("-m", "sglang.launch_server")
    """What that interpreter runs."""
    arguments: tuple[str, ...] = ()
    """SGLang's own further arguments, such as `--mem-fraction-static,0.8`."""
    host: str = "127.0.0.1"
    """Address of rank 0's machine as the servers see it; weights are sent from there."""
    concurrency: int = 128
    """Requests under way per server."""
    bucket_mib: int = 512
    """Size of the pieces that a weight sync travels in."""
    startup_timeout_s: float = 900.0
    """Deadline for a server to answer after its start."""
    request_timeout_s: float = 1800.0
    """Deadline of one response."""
    update_timeout_s: float = 300.0
    """Deadline of every request and wait of a weight sync."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy loss and what goes into it. Fields left at null take the preset's value."""

    preset: Literal[
        "etr",
        "grpo",
        "dapo",
        "etr_micro",
        "etr_macro",
        "etr_second_order",
        "etr_matched",
        "etr_shuffled",
        "etr_inverted_macro",
        "dr_grpo",
        "gspo",
        "cispo",
        "rloo",
    ] = "etr"
    """The algorithm: a named set of the fields below."""
    loss: str | None = None
    """`clipped`, `gspo`, `cispo`, `reinforce`, or `package.module:function` of your own: `f(LossInputs) -> LossOutputs`."""
    baseline: Literal["group_mean", "leave_one_out"] | None = None
    """What a reward is compared with: the mean of its group, or of the group's other responses."""
    normalize: bool | None = None
    """Divide the advantage by the group's standard deviation."""
    micro: Literal["tanh", "linear", "none"] | None = None
    """How the radius follows the advantage's magnitude."""
    macro: Literal["variance", "inverse_variance", "std", "none"] | None = None
    """How the radius follows the group's variance."""
    control: Literal["none", "matched", "shuffled"] | None = None
    """Replaces the radii by a control's: their mean on the same batch, or the same radii dealt out to other samples."""
    alpha: float | None = None
    """Strength of micro `tanh`."""
    gamma: float | None = None
    """Strength of macro `variance`."""
    eps_low: float | None = None
    """Base radius below 1."""
    eps_high: float | None = None
    """Base radius above 1."""
    eps_min: float | None = None
    """Floor of both radii."""
    eps_max: float | None = None
    """Ceiling of both radii; below 1, except for `cispo`, where an `eps_low` of 1 is no lower bound."""
    delta: float = 1e-6
    """Added to the group's deviation in the advantage."""
    log_ratio_bound: float = 20.0
    """abs(log r) is bounded by this before exp()."""
    dual_clip: float | None = None
    """With a negative advantage the `clipped` loss stops at this many times the advantage (dual clip); above 1, null is off."""
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] | None = None
    """How token losses become one number per optimizer step: every token alike, every sequence alike, or tokens over a constant
    (no length bias)."""
    constant_length: int | None = None
    """Divisor per sequence of `constant_length`; null is `rollout.max_response_tokens`."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model (the policy the run started from); 0 keeps no reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where that KL goes: a term of the loss, or k1 summed over each response and subtracted from its trained reward."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL, per token; null is k3 in the loss, where the gradient of k1 has mean zero, and k1 in the reward,
    where k2 and k3 are refused."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weights the policy term by trainer over engine probability: truncated at `correction_cap` (TIS), or 0 outside of
    `correction_floor` to `correction_cap` (MIS)."""
    correction_level: Literal["token", "sequence"] = "token"
    """The weight of each token, or of the whole response (their product)."""
    correction_cap: float = 2.0
    """Largest weight."""
    correction_floor: float = 0.5
    """Least weight that `mask` keeps."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of the policy."""

    minibatches: int = 4
    """Minibatches of whole groups that `rollout.prompts_per_step` is split into; each is one optimizer step."""
    epochs: int = 1
    """Passes over a rollout; a rollout gives `epochs * minibatches` optimizer steps."""
    tokens_per_microbatch: int = 4096
    """Token budget of one packed microbatch; a longer sample gets one of its own."""
    lr: float = 1e-6
    """Peak learning rate of Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_warmup_updates: int = 0
    """Linear warm-up from zero, in optimizer steps; the first one's learning rate is 0."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over the whole run."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Adam's first decay rate."""
    adam_beta2: float = 0.95
    """Adam's second decay rate."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 is off."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, core attention only, or whole layers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass goes on."""
    head_chunk_rows: int | None = None
    """Loss rows per chunk of the LM head: `rows x V/TP` fp32 logits exist at a time, twice that with TP on CUDA; null is at
    most 384 on CPU, 1024 on CUDA."""


@dataclass(frozen=True)
class ParallelConfig:
    """Layout of the policy; data parallelism is what is left of the world size."""

    tp: int | Literal["auto"] = "auto"
    """Tensor parallel size; `auto` is min(2, world size / pp)."""
    pp: int = 1
    """Pipeline parallel size."""
    ep: int = 1
    """Expert parallel size: ranks of a pipeline stage that a layer's experts are spread over (models with experts)."""
    etp: int | None = None
    """Tensor parallel size of a single expert; null is `tp`."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions over the sequence (needs tp > 1)."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every: int = 10
    """Steps between evaluations (also before the first and after the last); 0 is never."""
    problems: int = 128
    """At most so many problems of `data.eval`."""
    temperature: float = 0.0
    """0 is greedy."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 25
    """Steps between checkpoints (also after the last step); 0 is never."""
    keep: int = 2
    """Last checkpoints kept."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory; false refuses to start in a used one."""


@dataclass(frozen=True)
class ObserveConfig:
    """What is written while it runs; metrics.jsonl always is."""

    tensorboard: bool = True
    """Event files beside the metrics."""
    wandb_project: str | None = None
    """Weights & Biases project; null is off."""
    progress: bool = True
    """A bar on the terminal."""
    rollouts_every: int = 1
    """Steps between saved rollouts; 0 is never."""
    rollouts_groups: int = 4
    """Groups written per saved step."""


@dataclass(frozen=True)
class Config:
    """The whole configuration; one attribute per room."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sglang: SglangConfig = field(default_factory=SglangConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
