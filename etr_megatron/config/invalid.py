"""What is raised of a config that is wrong."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from etr_megatron.config.schema import Config
from etr_megatron.errors import UserError


class InvalidConfigError(UserError):
    """A config with problems, all of which are in the message.

    config: as far as it could be read. doubtful: the `section.key`s whose values in it are wrong in themselves, or not what the
    user has tried to set; whatever else is found out about the config must not be built on them.
    """

    def __init__(self, head: str, problems: Sequence[str], config: Config, doubtful: Collection[str]) -> None:
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in problems)]))
        self.problems, self.config, self.doubtful = list(problems), config, frozenset(doubtful)
