"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the person who started the job can mend: a wrong key, a missing file, a full disk.

    The message is one sentence (or one list of sentences) that names the key, file, line, rank or sample and the way out.
    Entry points print it without a traceback and end with exit code 2; everything else that is raised is a defect of ours
    and keeps its traceback.
    """
