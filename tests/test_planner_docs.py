"""The planner output shown in docs/planner.md is what the planner prints."""

from __future__ import annotations

import os
import re
import shlex
import sys

import pytest

from tests import warm
from tests.runs import REPO

CONSOLES = re.findall(r"```console\n\$ (.*)\n((?:.*\n)*?)```", (REPO / "docs" / "planner.md").read_text())


@pytest.mark.parametrize(("command", "shown"), CONSOLES, ids=[command.split("--config ")[1] for command, _ in CONSOLES])
def test_a_console_of_the_docs_is_what_the_tool_prints(command, shown):
    python, *words = shlex.split(command)
    assert python == ".venv/bin/python"
    said, _ = warm.start([sys.executable, *words], {**os.environ}).communicate(timeout=600)
    assert said == shown


def test_the_docs_have_consoles():
    assert len(CONSOLES) == 4
