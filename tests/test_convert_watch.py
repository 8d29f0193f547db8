"""How ranks of a conversion watch each other, even if their store's machine disappears without closing connections."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from etr_megatron.convert import watch
from etr_megatron.platform import heartbeat


class Silent:
    """A store that answers this many times and then hangs: its connection stays open, with nobody at the other end."""

    def __init__(self, answers: int, over: threading.Event) -> None:
        self._left, self._over = answers, over

    def _answer(self, *_):
        if self._left == 0:
            self._over.wait(300)
            raise RuntimeError("timed out after days")
        self._left -= 1
        return 0

    add = check = set = _answer


def test_a_store_that_no_longer_answers_is_an_error_after_the_silence_and_not_after_its_own_deadline(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "SILENCE_S", 1.0)
    over, said, heard = threading.Event(), [], threading.Event()

    def give_up(why):
        said.append(why)
        heard.set()

    arguments = (Silent(4, over), 1, 2, threading.Event(), give_up)
    thread = threading.Thread(target=watch._watch, args=arguments, daemon=True)
    thread.start()
    assert heard.wait(300)
    assert said == ["rank 0's machine has not answered for 1 s"]
    over.set()
    thread.join(300)
    assert not thread.is_alive()


def test_a_store_that_answers_is_left_alone(monkeypatch):
    done, said, beats, now = threading.Event(), [], iter(range(1 << 30)), [0.0]
    monkeypatch.setattr(watch, "BEAT_S", 0.0)
    monkeypatch.setattr(watch, "SILENCE_S", 300.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Answering:
        def add(self, *_):
            return next(beats)

        def check(self, *_):
            now[0] += 100.0
            if now[0] > 2000.0:  # several silence limits
                done.set()
            return False

        def set(self, *_):
            return None

    thread = threading.Thread(target=watch._watch, args=(Answering(), 1, 2, done, said.append))
    thread.start()
    thread.join(300)
    assert said == [] and done.is_set()
    for one in threading.enumerate():
        if isinstance(one, threading.Timer):
            one.join(10)
            assert not one.is_alive()
