"""Problems that may have killed servers, kept in a file, so that a restarted run does not lose servers to them again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from etr_megatron.errors import UserError
from etr_megatron.platform.files import write_atomically

logger = logging.getLogger(__name__)


@dataclass
class Suspicions:
    """deaths: problem id -> number of servers that died with it, among others, in flight since its last complete response.
    given_up: id of a problem that killed a server alone -> why. file: None keeps both in memory only."""

    file: Path | None = None
    deaths: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Suspicions:
        """The state that was written last; empty when there is no such file or it cannot be read."""
        try:
            found = json.loads(file.read_text())
            return cls(file, dict(found["deaths"]), dict(found["given_up"]))
        except FileNotFoundError:
            return cls(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is ignored, so problems that killed servers before may be requested again: %s", file, error)
            return cls(file)

    def write(self, deaths: Mapping[str, int]) -> None:
        """Write the deaths if they have changed. A write error is only logged: the run must not end over it."""
        if self.deaths != deaths:
            self.deaths = dict(deaths)
            self._write()

    def give_up(self, problem: str, why: str) -> None:
        """Record why this problem is not requested any more."""
        self.given_up[problem] = why
        self._write()

    def _write(self) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps({"deaths": self.deaths, "given_up": self.given_up}, indent=1).encode())
        except (UserError, OSError) as error:
            logger.warning(
                "problems that may have killed servers are not saved, and a restart would request them again: %s", error
            )
