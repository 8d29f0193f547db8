"""A user's environment that does what the last message says, and pools of it."""

from __future__ import annotations

from etr_megatron.config import EnvironmentConfig
from etr_megatron.environment import EnvironmentPool, EnvironmentReply, EnvironmentRequest

USER_ENVIRONMENT = """
import asyncio, os, subprocess, sys, time

def by_command(messages, answer, columns):
    return eval(messages[-1]["content"])

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.02)
    return name

def hang():
    while True:
        pass

def with_a_child(then):
    pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
    with open("child.new", "w") as file:
        file.write(str(pid))
    os.rename("child.new", "child")
    return then()

def die_once(name):
    if not os.path.exists(name):
        open(name, "w").close()
        os._exit(7)
    return "alive"

def noise():
    print("noise" * 1000)
    os.write(1, b"raw noise")
    return "quiet" if sys.stdin.read() == "" else "?"

def fail(error):
    raise error

lock = None

async def later(messages, answer, columns):
    global lock
    lock = lock or asyncio.Lock()  # belongs to one event loop
    async with lock:
        await asyncio.sleep(0)
    value = eval(messages[-1]["content"])
    return await value if asyncio.iscoroutine(value) else value

def decorated(function):
    return lambda *args: function(*args)

wrapped = decorated(later)

async def appears(name):
    while not os.path.exists(name):
        await asyncio.sleep(0.02)
    return name

async def ignore_cancellation():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            open("cancelled", "w").close()

began = 0

async def all_of(count):
    global began
    began += 1
    while began < count:
        await asyncio.sleep(0.01)
    return "together"

def of_two(messages, answer):
    return "hello"
"""
OK = EnvironmentReply(None, "ok", "")


def said(*texts: str, role: str = "user") -> EnvironmentReply:
    return EnvironmentReply([{"role": role, "content": text} for text in texts], "ok", "")


def ask(code: str, answer: str = "5", **columns: object) -> EnvironmentRequest:
    return EnvironmentRequest(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": code}], answer, columns, "p@5/3"
    )


def pool_of(
    function: str, workers: int = 1, timeout_s: float = 600.0, role: str = "user", concurrency: int = 64
) -> EnvironmentPool:
    limits = dict(workers=workers, concurrency=concurrency, timeout_s=timeout_s)
    return EnvironmentPool(EnvironmentConfig(function=function, role=role, **limits))


def all_replies(pool: EnvironmentPool) -> dict[int, EnvironmentReply]:
    found: dict[int, EnvironmentReply] = {}
    while pool.under_way:
        found |= pool.poll(600.0)
    return found


def answers(pool: EnvironmentPool, *codes: str) -> list[EnvironmentReply]:
    for key, code in enumerate(codes):
        pool.submit(key, ask(code))
    replies = all_replies(pool)
    return [replies[key] for key in range(len(codes))]
