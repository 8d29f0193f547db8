"""The syntax of import paths for user functions."""

from __future__ import annotations

import re

_NAME = r"[^\W\d]\w*"
IMPORT_PATH = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}(\.{_NAME})*")
"""`package.module:function`, where the function may be an attribute of a class."""
