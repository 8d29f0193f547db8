"""A user's own environments and rewards of dialogues, for runs whose policy is too small to get anything right."""

from __future__ import annotations

import time


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


def never_answers_some(messages, answer, columns):
    """No reply to problems with one answer in five."""
    if int(answer) % 5 == 0:
        time.sleep(3600)
    return by_answer(messages, answer, columns)
