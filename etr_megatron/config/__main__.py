"""`python -m etr_megatron.config > docs/config.md`: print the reference of every key."""

from __future__ import annotations

import sys

from etr_megatron.config.reference import render_reference

sys.stdout.write(render_reference())
