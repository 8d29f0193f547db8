"""Groups from an engine that generates while the ranks train."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from etr_megatron.config import Config
from etr_megatron.data import AnyCursor
from etr_megatron.rollout.collect import Decode
from etr_megatron.rollout.engine import MustStop, StreamingEngine, never
from etr_megatron.rollout.grading import StreamingGrader
from etr_megatron.rollout.rank0 import of_rank0, on_rank0, on_rank0_until_stopped
from etr_megatron.rollout.rollout_buffer import RolloutBuffer
from etr_megatron.rollout.sampler import Rollouts, Timer

if TYPE_CHECKING:
    from etr_megatron.rollout.dialogues import Dialogues


class StreamingSampler:
    """See `Sampler`. Rank 0 has the grader, holds the groups and calls the engine; the other ranks get the groups of a step
    from it."""

    def __init__(
        self,
        config: Config,
        engine: StreamingEngine,
        cursor: AnyCursor,
        decode: Decode,
        grader: StreamingGrader | None,
        dialogues: Dialogues | None = None,
    ) -> None:
        """dialogues: on rank 0, if there is an environment."""
        self._cursor, self._is_colocated = cursor, config.sglang.placement == "colocated"
        self._buffer = None if grader is None else RolloutBuffer(config, engine, cursor, decode, grader, dialogues)

    def take(self, step: int, timer: Timer, must_stop: MustStop = never) -> Rollouts:
        """See `Sampler.take`. After an EngineGoneError, NeedsSyncError or StopAskedError all groups are still pending."""
        # Rank 0 times generation and grading separately.
        with nullcontext() if self._buffer is not None else timer("rollout"):
            return on_rank0_until_stopped(
                lambda anywhere: of_rank0(self._buffer).take(step, timer, anywhere), must_stop, share=Rollouts.for_other_ranks
            )

    def put_back(self, step: int) -> None:
        """See `Sampler.put_back`."""
        if self._buffer is not None:
            self._buffer.put_back(step)

    def cut_off(self) -> None:
        """See `Sampler.cut_off`."""
        if self._is_colocated:
            on_rank0(lambda: of_rank0(self._buffer).cut_off(), long=True)

    def pause(self) -> None:
        """See `Sampler.pause`."""
        on_rank0(lambda: of_rank0(self._buffer).pause(), long=True)

    def resume(self) -> None:
        """See `Sampler.resume`."""
        on_rank0(lambda: of_rank0(self._buffer).resume())

    def state_dict(self) -> dict[str, Any]:
        """See `Sampler.state_dict`."""
        buffer = {} if self._buffer is None else self._buffer.state_dict()
        return {"cursor": self._cursor.state_dict(), **buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Sampler.load_state_dict`."""
        self._cursor.load_state_dict(state["cursor"])
        if self._buffer is not None:
            self._buffer.load_state_dict(state)

    def close(self) -> None:
        """See `Sampler.close`."""
        if self._buffer is not None:
            self._buffer.close()
