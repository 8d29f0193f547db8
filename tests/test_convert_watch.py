"""How ranks of a conversion watch each other, even if their store's machine disappears without closing connections."""

from __future__ import annotations

import threading

from etr_megatron.convert import watch


class Silent:
    """A store that answers this many times and then hangs: its connection stays open, with nobody at the other end."""

    def __init__(self, answers: int, over: threading.Event) -> None:
        self._left, self._over = answers, over

    def _answer(self, *_):
        if self._left == 0:
            self._over.wait(30)
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
    assert heard.wait(20)
    assert said == ["rank 0's machine has not answered for 1 s"]
    over.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_store_that_answers_is_left_alone(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "SILENCE_S", 0.4)
    done, said, beats = threading.Event(), [], iter(range(1 << 30))

    class Answering:
        def add(self, *_):
            return next(beats)

        def check(self, *_):
            return False

        def set(self, *_):
            return None

    thread = threading.Thread(target=watch._watch, args=(Answering(), 1, 2, done, said.append))
    thread.start()
    done.wait(1.5)  # longer than several silence limits
    done.set()
    thread.join(20)
    assert said == []
    for one in threading.enumerate():
        if isinstance(one, threading.Timer):
            one.join(10)
            assert not one.is_alive()
