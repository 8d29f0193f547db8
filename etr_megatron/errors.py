"""Exceptions for failures that a user or a scheduler can fix."""


class UserError(Exception):
    """A failure that the user can fix: a wrong key, a missing file, a full disk.

    The message is one sentence (or a list of sentences) that names the key, file, line, rank or sample and the fix.
    Entry points print it without a traceback and exit with code 2. Any other exception is a bug in this package and keeps its
    traceback.
    """


class RequeueError(UserError):
    """The run stopped, and the same command resumes it from its last checkpoint.

    The exit code is 75 (EX_TEMPFAIL), so that a scheduler can tell it from a user error.
    """
