"""What goes on in a thread of its own while the ranks train: responses arrive, turns are drawn, and what has ended is graded.
Calls of others end it first."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from etr_megatron.platform.background_loop import BackgroundLoop
from etr_megatron.rollout import EngineGoneError, NeedsSyncError, RefusedError, rollout_buffer
from etr_megatron.rollout.collect import UngradedError
from etr_megatron.rollout.rollout_buffer import RolloutBuffer
from etr_megatron.rollout.sampler import Rollouts
from tests.rollout_buffers import Environment, Talker, assert_dialogue, buffer_of, sync, through_disk, timer

LONG_S = 60.0


def until(holds) -> None:
    end = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("responses", "a loop")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not loops()


def test_the_work_is_repeated_until_it_is_stopped():
    count = Counter()
    loop = BackgroundLoop(lambda: count.update("x") or True, "a loop")
    loop.start()
    loop.start()
    assert len(loops()) == 1
    until(lambda: count["x"] > 3)
    loop.stop()
    before = count["x"]
    loop.stop()
    assert not loops() and count["x"] == before
    loop.start()
    until(lambda: count["x"] > before)
    loop.stop()


def test_the_work_ends_when_there_is_none_and_can_begin_again():
    count = Counter()
    loop = BackgroundLoop(lambda: bool(count.update("x")), "a loop")
    for turn in (1, 2):
        loop.start()
        until(lambda: not loops())
        loop.stop()
        assert count["x"] == turn


def test_what_the_work_raises_is_raised_once_by_stop_and_it_does_not_begin_before():
    def fail():
        count.update("x")
        raise ValueError("the work")

    count = Counter()
    loop = BackgroundLoop(fail, "a loop")
    loop.start()
    until(lambda: not loops())
    with loop.held():
        pass
    loop.start()
    assert not loops() and count["x"] == 1
    with pytest.raises(ValueError, match="the work"):
        loop.stop()
    loop.stop()


@pytest.mark.parametrize("raises", [False, True])
def test_the_work_rests_in_a_block_and_goes_on_after_it_if_it_went_on_before(raises):
    count = Counter()
    loop = BackgroundLoop(lambda: count.update("x") or True, "a loop")
    with loop.held():
        assert not loops()
    assert not loops()
    loop.start()
    try:
        with loop.held():
            assert not loops()
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert bool(loops()) is not raises
    loop.stop()


class Guarded(Talker):
    """Notes when two threads use it at a time, and which one waits."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.overlaps, self.waits, self._inside = 0, 0, threading.Lock()
        self.error: Exception | None = None
        self.gate = threading.Event()  # the loop's waits end when it is set
        self.gate.set()

    def _alone(self, call):
        self.overlaps += not self._inside.acquire(blocking=False)
        try:
            return call()
        finally:
            self._inside.release()

    def submit(self, draws):
        self._alone(lambda: super(Guarded, self).submit(draws))

    def wait(self, timeout_s):
        def wait():
            if threading.current_thread().name == "responses":
                self.waits += 1
                self.gate.wait(LONG_S)
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            return super(Guarded, self).wait(timeout_s)

        return self._alone(wait)

    def stop(self, *, abort):
        assert not loops()
        return self._alone(lambda: super(Guarded, self).stop(abort=abort))


def assert_dialogues(taken) -> None:
    for group in taken.groups:
        for sample in group.samples:
            assert_dialogue(group.problem, sample)


@pytest.fixture
def alone(monkeypatch):
    """Whatever changes or reads the groups in the main thread does so while nothing else goes on."""

    def guarded(function):
        def call(*args, **options):
            assert threading.current_thread() is not threading.main_thread() or not loops()
            return function(*args, **options)

        return call

    for name in ("_ask", "_choose", "_submit", "_accept", "_accept_grades", "_go_on", "_continue"):
        monkeypatch.setattr(RolloutBuffer, name, guarded(getattr(RolloutBuffer, name)))
    monkeypatch.setattr(rollout_buffer, "pack", guarded(rollout_buffer.pack))


@pytest.mark.parametrize("partial", [True, False], ids=["cut off", "waited for"])
def test_further_turns_are_drawn_while_the_ranks_train(partial, alone):
    engine, environment = Guarded(), Environment()
    ours = buffer_of(engine, environment=environment, max_staleness=1, partial=partial)
    ours.take(1, timer)
    until(lambda: not any(held.missing for held in ours._groups))
    turns = Counter(sample.turns for held in ours._groups for sample in held.group.samples)
    assert len(ours._groups) >= 4 and turns[1] and turns[2] and turns[3]
    sync(ours, engine)
    taken = ours.take(2, timer)
    assert_dialogues(taken)
    assert all(set(sample.token_versions()) == {0} for group in taken.groups for sample in group.samples)
    ours.close()
    assert not engine.overlaps


def test_a_late_reply_is_waited_for_while_the_engine_has_nothing_to_do():
    engine, environment = Guarded(), Environment(slow=lambda number: number > 3)
    ours = buffer_of(engine, environment=environment, max_staleness=1)
    ours.take(1, timer)
    until(lambda: ours._replying and not ours._under_way)
    polls = environment.polls
    until(lambda: environment.polls > polls + 10)
    environment.slow = lambda number: False
    until(lambda: not any(held.missing for held in ours._groups))
    until(lambda: not loops())
    ours.close()


def test_further_turns_are_drawn_between_a_weight_sync_and_the_next_step():
    """While an evaluation has its responses, and a checkpoint is saved."""
    engine, environment = Guarded(), Environment(slow=lambda number: number > 3)
    ours = buffer_of(engine, environment=environment, max_staleness=1)
    ours.take(1, timer)
    sync(ours, engine)
    assert all(held.missing for held in ours._groups)
    environment.slow = lambda number: False
    until(lambda: not any(held.missing for held in ours._groups))
    taken = ours.take(2, timer)
    assert_dialogues(taken)
    mixed = [sample.weight_versions for group in taken.groups for sample in group.samples if sample.turns > 1]
    assert mixed and all(set(each) == {0, 1} for each in mixed)  # also without partial rollouts
    ours.close()


def test_nothing_goes_on_where_nothing_is_ahead():
    ours = buffer_of(Guarded(), environment=Environment())
    ours.take(1, timer)
    ours.pause()
    ours.resume()
    assert not loops()


@pytest.mark.parametrize("call", ["take", "pause", "put_back", "state_dict", "close"])
def test_a_call_waits_for_what_is_going_on_before_it_touches_the_groups(call, alone):
    engine, environment = Guarded(), Environment(slow=lambda number: number > 3)
    ours = buffer_of(engine, environment=environment, **{"max_staleness": 1, "partial": True})
    engine.gate.clear()
    ours.take(1, timer)
    until(lambda: engine.waits)
    environment.slow = lambda number: False
    threading.Timer(0.05, engine.gate.set).start()
    getattr(ours, call)(*{"take": (2, timer), "put_back": (1,)}.get(call, ()))
    assert engine.gate.is_set() and not engine.overlaps
    assert not loops() or call in ("take", "state_dict")
    assert (ours._background._thread is not None) is (call in ("take", "state_dict"))
    ours.close()


def test_at_any_moment_a_checkpoint_is_of_one_moment(alone):
    """Taken again and again while responses come in, each is resumed to whole responses."""
    engine, environment = Guarded(), Environment(delay=lambda: 2)
    ours = buffer_of(engine, environment=environment, max_staleness=2, partial=True)
    states = []
    for step in (1, 2, 3):
        assert_dialogues(ours.take(step, timer))
        for _ in range(8):
            states.append((step, through_disk({"cursor": ours._cursor.state_dict(), **ours.state_dict()})))
            time.sleep(0.001)
        sync(ours, engine)
    ours.close()
    for step, state in states[::3]:
        engine = Guarded()
        engine.weight_version = step - 1
        again = buffer_of(engine, environment=Environment(), max_staleness=2, partial=True)
        again._cursor.load_state_dict(state["cursor"])
        again.load_state_dict(state)
        again.resume()
        for further in (step + 1, step + 2):
            assert_dialogues(again.take(further, timer))
        again.close()


def ended_alone(engine: Guarded, environment: Environment, error: Exception) -> tuple[RolloutBuffer, Rollouts]:
    """A rollout buffer whose background loop has ended with the engine's error after step 1, and that step's groups."""
    ours = buffer_of(engine, environment=environment, max_staleness=1, partial=True)
    engine.gate.clear()
    taken = ours.take(1, timer)
    engine.error = error
    engine.gate.set()
    until(lambda: not loops())
    return ours, taken


ERRORS = [EngineGoneError("no server is left"), NeedsSyncError("the last one"), RefusedError("too long")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("before", ["", "state_dict", "pause"])
def test_an_error_of_the_engine_comes_up_in_the_next_step_unless_a_sync_mends_it(error, before, alone):
    engine, environment = Guarded(), Environment(slow=lambda number: number > 3)
    ours, _ = ended_alone(engine, environment, error)
    environment.slow = lambda number: False
    if before == "state_dict":
        state = ours.state_dict()
        assert len(state["in_hand"]) == len(ours._groups) and not loops()
    if before == "pause":
        sync(ours, engine)
    else:
        with pytest.raises(type(error), match=str(error)):
            ours.take(2, timer)
        sync(ours, engine)
    taken = ours.take(2, timer)
    assert_dialogues(taken)
    ours.close()
    assert Counter(environment.asked).most_common(1)[0][1] == 1


NAMED = [EngineGoneError("no server is left"), UngradedError("fix it"), RuntimeError("a bug")]


@pytest.mark.parametrize("error", NAMED, ids=lambda error: type(error).__name__)
def test_after_an_error_the_steps_groups_can_be_put_back_and_saved(error, alone):
    """A run that ends for another reason, such as SIGTERM, must not lose what it has trained."""
    engine, environment = Guarded(), Environment(slow=lambda number: number > 3)
    ours, taken = ended_alone(engine, environment, error)
    ours.put_back(1)
    saved = {held["group"]["id"] for held in ours.state_dict()["in_hand"]}
    assert {group.id for group in taken.groups} <= saved
    ours.close()


@pytest.mark.parametrize("call", ["take", "pause"])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), UngradedError("fix it")], ids=["bug", "mistake"])
def test_any_other_error_comes_up_in_the_next_call_that_is_not_the_last(call, error, alone):
    engine, environment = Guarded(), Environment()
    ours, _ = ended_alone(engine, environment, error)
    ours.state_dict()
    with pytest.raises(type(error), match=str(error)):
        getattr(ours, call)(*((2, timer) if call == "take" else ()))
    ours.close()


def test_an_error_after_the_last_step_does_not_hinder_the_end():
    engine = Guarded()
    ours = buffer_of(engine, environment=Environment(), max_staleness=1, partial=True)
    engine.gate.clear()
    ours.take(1, timer)
    engine.error = RuntimeError("a bug")
    engine.gate.set()
    ours.close()


def test_an_evaluation_in_the_main_thread_gets_its_own_replies_while_dialogues_go_on():
    engine, environment = Guarded(), Environment(delay=lambda: 1)
    ours = buffer_of(engine, environment=environment, max_staleness=1, partial=True, prompts=16)
    other = buffer_of(Talker(), environment=environment, count=30)  # its dialogues, of an owner of its own, share the lock
    other._dialogues = ours._dialogues
    for step in range(1, 4):
        ours.take(step, timer)
        assert_dialogues(other.take(step, timer))
        sync(ours, engine)
    assert_dialogues(ours.take(4, timer))
    ours.close()
    assert not engine.overlaps
