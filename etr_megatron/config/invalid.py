"""What is raised of a config that is wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from etr_megatron.config.schema import Config
from etr_megatron.errors import UserError


class InvalidConfigError(UserError):
    """A config with problems, all of which are in the message.

    head: how the message begins. config: as far as it could be read. doubtful: the `section.key`s whose values in it are wrong
    in themselves, or not what the user has tried to set; nothing else can be said on the strength of these.
    """

    def __init__(self, head: str, problems: Sequence[str], config: Config, doubtful: Collection[str] = ()) -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__("\n".join([f"{head}, {count}:", *(f"  - {problem}" for problem in problems)]))
        self._head, self._problems, self.config, self.doubtful = head, list(problems), config, frozenset(doubtful)

    def beside(self, problems: Sequence[str]) -> InvalidConfigError:
        """The same with more problems."""
        return InvalidConfigError(self._head, [*self._problems, *problems], self.config, self.doubtful)
