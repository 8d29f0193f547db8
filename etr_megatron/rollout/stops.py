"""Texts that end a turn of the model, wherever they begin and end in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopStrings:
    """The texts of `rollout.stop_strings`. False if there are none.

    decode: the tokenizer's, with special tokens as text. SGLang calls it in the same way, so that both engines match the same.
    """

    def __init__(self, texts: Sequence[str] = (), decode: Callable[[list[int]], str] = str) -> None:
        self.texts, self._decode = tuple(texts), decode
        # Every token has at least one byte, so a text lies in at most as many tokens as it has bytes. One more, because some
        # decoders drop the space before the first word.
        self._window = 1 + max((len(text.encode()) for text in texts), default=0)

    def __bool__(self) -> bool:
        return bool(self.texts)

    def end_with(self, ids: Sequence[int]) -> bool:
        """Whether a text ends in the last of a turn's tokens, if none ends in an earlier one. Decodes only as many tokens as a
        text can have."""
        return bool(self.texts) and self._are_in(ids[-self._window :])

    def end(self, ids: Sequence[int], begin: int = 0) -> int | None:
        """Number of a turn's tokens up to the first in which a text ends; None if there is none. No text ends in the first
        `begin` of them."""
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
