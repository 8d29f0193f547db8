"""A user's reward functions that misbehave by command, requests to grade, and graders in this process."""

from __future__ import annotations

import itertools
import time

from etr_megatron.reward import GradeRequest

USER_REWARDS = """
import atexit, os, sys, threading, time

def by_command(prompt, response, answer):
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(7)
    if response == "segfault":
        os.kill(os.getpid(), 11)
    if response == "die once":
        flag = os.path.join(os.path.dirname(__file__), "died")
        if not os.path.exists(flag):
            open(flag, "w").close()
            os._exit(7)
        return 1.0
    if response == "sys.exit":
        raise SystemExit(3)
    if response == "raise":
        raise ValueError("no such thing")
    if response == "print":
        print("noise" * 1000)
        os.write(1, b"raw noise")
        return 0.25 if sys.stdin.read() == "" else 0.0
    if response == "pid":
        return os.getpid()
    if response == "torch":
        return "torch" in sys.modules
    return eval(response)

def hold(pid):
    if os.getpid() == pid:
        threading.Thread(target=time.sleep, args=(600,)).start()
    atexit.register(end)
    return 1.0

def end():
    time.sleep(0.2)
    open(os.path.join(os.path.dirname(__file__), f"ended {os.getpid()}"), "w").close()

def of_two(prompt, response):
    return 1.0

not_callable = 3
"""
NOT_TO_BE_SHOWN = "type('Odd', (), {'__repr__': lambda self: 1 / 0})()"
NO_NUMBER = "type('Odd', (), {'__float__': lambda self: 1 / 0})()"


def request(response: str, answer: str = "5") -> GradeRequest:
    return GradeRequest("prompt", response, answer)


class Graders:
    """Grades with a function of requests when `poll` is called, unless `is_slow()`."""

    def __init__(self, grade) -> None:
        self.grade, self.is_slow, self._keys, self._requests = grade, lambda: False, itertools.count(), {}

    def submit(self, requests):
        keys = list(itertools.islice(self._keys, len(requests)))
        self._requests |= zip(keys, requests, strict=True)
        return keys

    def poll(self, keys, timeout_s):
        if self.is_slow():
            time.sleep(min(timeout_s, 0.01))
            return {}
        asked = list(keys)
        return dict(zip(asked, self.grade([self._requests[key] for key in asked]), strict=True))
