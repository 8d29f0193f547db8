"""Run one rank, from its config to the run's last step."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from etr_megatron import platform
from etr_megatron.checks import dedicated_nodes
from etr_megatron.config import Config, config_warnings, resolved
from etr_megatron.data import (
    AnyCursor,
    BlendedCursor,
    ProblemSet,
    PromptCursor,
    ReplyTokenizer,
    build_tiny_policy,
    load_tokenizer,
    refuse_unknown_tokens,
    stop_token_ids,
)
from etr_megatron.environment import EnvironmentPool
from etr_megatron.errors import UserError
from etr_megatron.observe import Recorder, RunDirectory
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.platform.phases import PhaseBarriers
from etr_megatron.platform.preemption import StopRequest
from etr_megatron.platform.rank_liveness import RankLiveness
from etr_megatron.reward import GraderPool
from etr_megatron.status import given_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from etr_megatron.rollout import RolloutEngine, Sampler
    from etr_megatron.rollout.collect import Decode
    from etr_megatron.rollout.dialogues import Dialogues
    from etr_megatron.rollout.engine import StreamingEngine
    from etr_megatron.rollout.sglang import ServerNodes
    from etr_megatron.rollout.stops import StopStrings
    from etr_megatron.weights import Architecture


def run_rank(config: Config) -> None:
    """Run one rank of the job to the end; every rank makes the same call.

    config: resolved and checked. Leaves garbage collection enabled, even if the caller had disabled it; objects that exist when
    training begins stay frozen.
    Raises UserError or RequeueError, each with one sentence, if the run cannot continue.
    """
    checkpoint = initial_checkpoint(config)
    with ExitStack() as stack:
        workers = _Workers.start(config, stack)
        _train(config, checkpoint, workers, stack)


def initial_checkpoint(config: Config) -> Path:
    """The directory of the initial weights; builds the tiny policy if needed. Raises UserError if that fails."""
    if config.model.path != "tiny":
        return Path(config.model.path)
    # The first rank that arrives builds it and shows the progress.
    return build_tiny_policy(config.tiny, config.arithmetic, progress=config.observe.progress)


@dataclass(frozen=True)
class _Workers:
    """Processes that call the user's functions; None on ranks other than 0. environment: also None if the config has no
    environment, or the run is a replay."""

    grader: GraderPool | None = None
    environment: EnvironmentPool | None = None

    @classmethod
    def start(cls, config: Config, stack: ExitStack) -> _Workers:
        """Start them; call it before this rank has threads and sockets. They end with `stack`, or with the rank even after a
        kill -9."""
        if int(os.environ.get("RANK", "0")) != 0:
            return cls()
        is_asked = config.environment.function is not None and config.rollout.replay is None
        return cls(
            stack.enter_context(GraderPool(config.reward)),
            stack.enter_context(EnvironmentPool(config.environment)) if is_asked else None,
        )


def _train(config: Config, model_dir: Path, workers: _Workers, stack: ExitStack) -> None:
    from etr_megatron.policy import Policy, configured_layout
    from etr_megatron.policy.fp8 import require_fp8
    from etr_megatron.policy.packed_attention import require_packed_attention
    from etr_megatron.problem_sets import open_sets
    from etr_megatron.rollout.dialogues import Dialogues
    from etr_megatron.rollout.stops import StopStrings
    from etr_megatron.termination import RunTermination
    from etr_megatron.trainer import Trainer
    from etr_megatron.weights import check_checkpoint

    stop = StopRequest()
    phases = _join(config, stop)
    # Not before all ranks have joined: SIGTERM ends those that have not, and the others would wait for them until the grace
    # period is over. Later, torchrun also sends SIGTERM when another rank has failed. The failed rank joins no further barrier,
    # so the others cannot stop there with a checkpoint.
    stack.enter_context(stop.on_sigterm(config.run.stop_grace_s, given_up))
    require_fp8(config.fp8)  # this and the next before spending minutes on server startup
    require_packed_attention(config.train.megatron, config.model.dtype)
    layout = configured_layout(config)
    tokenizer = load_tokenizer(model_dir)
    architecture, stop_ids = check_checkpoint(model_dir), _stop_ids(model_dir, tokenizer, config.rollout.stop_tokens)
    nodes = _server_nodes(config, stack, stop) if layout.rank == 0 else None
    problems, held_out = open_sets(config, tokenizer, report=layout.rank == 0)
    directory = RunDirectory(Path(config.run.dir) / config.run.name)
    on_all_ranks(lambda: _open_directory(directory, config, stack) if layout.rank == 0 else None)
    termination = RunTermination(config, directory, RankLiveness.of_job(), stop)
    stack.enter_context(termination.during_startup())
    refuse_unknown_tokens([*problems, *held_out.problems], architecture.vocab_size, model_dir)
    phases.barrier("start of the rollout engine")
    engine = None
    if config.rollout.replay is None:
        stops = stop_ids, StopStrings(config.rollout.stop_strings, tokenizer.decode)
        engine = stack.enter_context(closing(_engine(config, model_dir, architecture, stops, directory, stop, nodes)))
    phases.barrier("loading of the model")
    cursor = _cursor(config, problems)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    dialogues = None
    if workers.environment is not None:
        reply_ids = ReplyTokenizer(config.data, tokenizer, stop_ids)
        dialogues = Dialogues(workers.environment, reply_ids, decode, max_turns=config.environment.max_turns)
    trainer = Trainer(
        config,
        engine=engine,
        policy=Policy(architecture, model_dir, config, layout),
        sampler=stack.enter_context(closing(_sampler(config, engine, cursor, decode, workers.grader, dialogues))),
        held_out=held_out,
        decode=decode,
        directory=directory,
        grader=workers.grader.grade if workers.grader else None,
        dialogues=dialogues,
        recorder=(lambda step: stack.enter_context(Recorder(config, directory, step))) if layout.rank == 0 else None,
        stop_request=stop,
        phases=phases,
    )
    stack.callback(trainer.close)  # after `termination` has recorded an error: other ranks may fail because of it
    # Modules and the model live to the end. Full garbage collections would scan them and stall this rank, and so all ranks.
    gc.freeze()
    gc.enable()
    termination.run(trainer.run, lambda: trainer.trained, lambda: trainer.has_begun)


def _join(config: Config, stop: StopRequest) -> PhaseBarriers:
    """Join the job's world; returns when all ranks have. SIGTERM ends a rank that waits here at once."""
    from etr_megatron.policy import init_world

    init_world(config.run.phase_timeout_s)
    # This connects all ranks; NCCL would connect them only when used.
    return PhaseBarriers(config.run.phase_timeout_s, must_stop=stop)


def _cursor(config: Config, problems: ProblemSet) -> AnyCursor:
    data, seed = config.data, config.run.seed
    if data.train_weights:
        return BlendedCursor(problems, data.train_weights, seed=seed, shuffle=data.shuffle)
    return PromptCursor(problems, seed, data.shuffle)


def _open_directory(directory: RunDirectory, config: Config, stack: ExitStack) -> None:
    """Lock the run directory for this job until `stack` closes. Raises UserError if another job is running there."""
    stack.enter_context(directory.locked())  # before anything there is changed
    directory.prepare(config)
    for warning in config_warnings(config):
        print(f"warning: {warning}", file=sys.stderr)


def _server_nodes(config: Config, stack: ExitStack, stop: StopRequest) -> ServerNodes | None:
    """The dedicated server nodes, which serve until `stack` closes; None if there are none. SIGTERM to one of them stops the
    job."""
    from etr_megatron.rollout.sglang import ServerNodes

    if not (dedicated := dedicated_nodes(config)):
        return None
    nodes = stack.enter_context(ServerNodes(dedicated, config.sglang))
    stop.add_source(nodes.asked_to_stop)
    return nodes


def _engine(
    config: Config,
    model_dir: Path,
    architecture: Architecture,
    stops: tuple[set[int], StopStrings],
    directory: RunDirectory,
    stop: StopRequest,
    nodes: ServerNodes | None,
) -> RolloutEngine:
    """The rollout engine that `rollout.backend` names. A collective. stops: ids of tokens and texts that end a turn. nodes: the
    dedicated server nodes, on rank 0 only. Raises StopAskedError if a stop is requested while it waits for servers."""
    from etr_megatron.policy.model_config import DTYPES

    stop_ids, stop_strings = stops
    if config.rollout.backend == "embedded":
        from etr_megatron.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(
            model_dir,
            dtype=DTYPES[config.model.dtype],
            device=platform.device(),
            batch_samples=config.rollout.batch_samples,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
        )
    from etr_megatron.rollout.sglang import Serving, SglangEngine

    serving = Serving(
        architecture,
        config.model.dtype,
        backend="nccl" if platform.uses_cuda() else "gloo",
        stop_ids=stop_ids,
        directory=directory.servers,
        temperature=config.rollout.temperature,
        max_gap=resolved(config.rollout.max_logprob_gap),
        routing=config.train.routing_replay,
        stop_strings=stop_strings,
    )
    return SglangEngine(config.sglang, model_dir, serving, nodes, must_stop=stop)


def _sampler(
    config: Config,
    engine: RolloutEngine | None,
    cursor: AnyCursor,
    decode: Decode,
    grader: GraderPool | None,
    dialogues: Dialogues | None,
) -> Sampler:
    """The sampler that returns the groups of each step."""
    from etr_megatron.rollout import ReplaySampler, RoundSampler, StreamingSampler

    if engine is None:
        return ReplaySampler(config, cursor)
    if config.rollout.backend == "embedded":
        return RoundSampler(config, engine, cursor, decode, grader.grade if grader else None, dialogues)
    servers = cast("StreamingEngine", engine)  # see `_engine`
    return StreamingSampler(config, servers, cursor, decode, grader, dialogues)


def _stop_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> set[int]:
    """End-of-sequence ids from generation_config.json (a chat model may have several) and from the tokenizer, and the ids of
    `stop_tokens`.

    Raises UserError if there are none, if those in generation_config.json are not token ids, or if a stop token is not a single
    token.
    """
    from etr_megatron.weights.hf_config import read_config

    stops = set(stop_token_ids(stop_tokens, tokenizer)) | {tokenizer.eos_token_id} - {None}
    file = model_dir / "generation_config.json"
    if file.is_file():
        named = read_config(file).get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        if not all(type(one) is int for one in ids if one is not None):  # excludes bool
            raise UserError(f"{file}: eos_token_id must be a token id or a list of token ids, not {json.dumps(named)}")
        stops |= set(ids) - {None}
    if not stops:
        raise UserError(
            f"{model_dir} has no end-of-sequence token, neither in its tokenizer nor in generation_config.json; name one in "
            "rollout.stop_tokens"
        )
    return stops
