"""The error for an invalid config."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from etr_megatron.config.schema import Config
from etr_megatron.errors import UserError


class InvalidConfigError(UserError):
    """A config is invalid; the message lists all problems.

    head: start of the message. config: the part of the config that could be read. unreliable_keys: the
    `section.key`s in it whose values are wrong or not what the user tried to set; checks must not draw conclusions from them.
    """

    def __init__(self, head: str, problems: Sequence[str], config: Config, unreliable_keys: Collection[str] = ()) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"{head}, {count}:", *(f"  - {problem}" for problem in problems)]))
        self._head, self._problems, self.config, self.unreliable_keys = head, list(problems), config, frozenset(unreliable_keys)

    def with_problems(self, problems: Sequence[str]) -> InvalidConfigError:
        """The same error with more problems."""
        return InvalidConfigError(self._head, [*self._problems, *problems], self.config, self.unreliable_keys)

    def with_head(self, head: str) -> InvalidConfigError:
        """The same error with another start of its message."""
        return InvalidConfigError(head, self._problems, self.config, self.unreliable_keys)
