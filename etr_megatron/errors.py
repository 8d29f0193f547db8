"""The exceptions that stand for what a person or a scheduler can mend."""


class UserError(Exception):
    """Something the person who started the job can mend: a wrong key, a missing file, a full disk.

    The message is one sentence (or one list of sentences) that names the key, file, line, rank or sample and the way out.
    Entry points print it without a traceback and end with exit code 2; everything else that is raised is a defect of ours
    and keeps its traceback.
    """


class RequeueError(UserError):
    """The run could not go on, has saved a checkpoint, and goes on from there when the same command is started again.

    The exit code is 75 (EX_TEMPFAIL), by which a scheduler can tell it from a mistake.
    """
