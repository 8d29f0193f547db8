"""A user's own environments and rewards of dialogues, for runs whose policy is too small to get anything right. Every process
of an environment imports this module, so it imports nothing that takes time."""

from __future__ import annotations

import asyncio
import time
import zlib


def again(messages, answer, columns):
    """One more turn for every odd digit of the last one, up to three."""
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    odd = sum(c in "13579" for c in turns[-1])
    return f"Again {odd}." if odd and len(turns) < 3 else None


def turns_are_even(prompt, response, answer, messages):
    """1 for an even sum of the digits of all turns; the last one must be the response."""
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    assert turns[-1] == response and messages[0] == {"role": "user", "content": prompt}
    return {"score": float(sum(map(int, filter(str.isdigit, "".join(turns)))) % 2 == 0), "turns": len(turns)}


def always_fails(messages, answer, columns):
    raise KeyError("tool")


def by_answer(messages, answer, columns):
    """One to three turns, by the problem's answer."""
    turns = sum(message["role"] == "assistant" for message in messages)
    return f"More {turns}." if turns <= int(answer) % 3 else None


async def never_answers_some(messages, answer, columns):
    """No reply to problems with one answer in five."""
    if int(answer) % 5 == 0:
        await asyncio.sleep(3600)
    return by_answer(messages, answer, columns)


def by_number(messages, answer, columns):
    """One to three turns, by the problem's number, and replies of one or two tokens."""
    number, turn = int(answer), sum(message["role"] == "assistant" for message in messages)
    time.sleep(0.05 * (zlib.crc32(messages[-1]["content"].encode()) % 3))
    return None if turn > number % 3 else words(tokens_of(number, turn))


def tokens_of(number, turn):
    """The reply of `by_number` to a turn."""
    return [11 + 10 * ((number + turn) % 3), 2 + number % 7 + 10 * (turn % 4)][: 1 + (number + turn) % 2]


def words(ids):
    return " ".join(map(str, ids))
