"""The planner output shown in docs/planner.md is what the planner prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.runs import REPO

CONSOLES = re.findall(r"```console\n\$ (.*)\n((?:.*\n)*?)```", (REPO / "docs" / "planner.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), CONSOLES, ids=[command.split("--config ")[1] for command, _ in CONSOLES])
def test_a_console_of_the_docs_is_what_the_tool_prints(command, shown):
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python"
    done = subprocess.run([sys.executable, *words[1:]], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.stdout == shown


def test_the_docs_have_consoles():
    assert len(CONSOLES) == 4
