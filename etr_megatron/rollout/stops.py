"""Stop strings: texts that end a turn of the model. They need not begin or end at a token boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopStrings:
    """The texts of `rollout.stop_strings`. As a bool, False if there are none.

    decode: the tokenizer's method, with special tokens as text. SGLang decodes in the same way, so both engines match the same
    texts.
    """

    def __init__(self, texts: Sequence[str] = (), decode: Callable[[list[int]], str] = str) -> None:
        self.texts, self._decode = tuple(texts), decode
        # Every token has at least one byte, so a text spans at most as many tokens as it has bytes. One token more, because
        # some decoders drop the space before the first word.
        self._window = 1 + max((len(text.encode()) for text in texts), default=0)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def end_with(self, ids: Sequence[int]) -> bool:
        """Whether a stop string ends in the last of a turn's tokens, provided that none ends in an earlier one. Decodes only as
        many tokens as a stop string can span."""
        return bool(self.texts) and self._are_in(ids[-self._window :])

    def end(self, ids: Sequence[int], begin: int = 0) -> int | None:
        """Number of a turn's tokens up to and including the first in which a stop string ends; None if there is none. The
        caller ensures that none ends in the first `begin` tokens."""
        if not self.texts or begin >= len(ids):
            return None
        tail = ids[max(0, begin + 1 - self._window) :]
        if not self._are_in(tail):
            return None
        if not self._are_in(tail[:-1]):
            return len(ids)
        places = range(begin + 1, len(ids) + 1)
        return next((place for place in places if self._are_in(ids[max(0, place - self._window) : place])), None)

    def _are_in(self, ids: Sequence[int]) -> bool:
        text = self._decode(list(ids))
        return any(stop in text for stop in self.texts)


NO_STOP_STRINGS = StopStrings()
