"""A server and its watchdog as forks of a process that has the server's imports, see tests/warm_servers.py."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn


def watch(files: list[int], command: list[str], environment: dict[str, str]) -> NoReturn:
    """Go on as `python WATCHDOG GRACE_S FD SERVER...`. files: stdin, output, and the one that is called FD."""
    os.setsid()
    stdin, output, report = files
    for number, file in enumerate((stdin, output, output)):
        os.dup2(file, number)
    os.close(stdin)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    _, path, grace_s, _, *server = command
    spec = importlib.util.spec_from_file_location("watchdog", path)
    watchdog = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watchdog)
    watchdog.subprocess = SimpleNamespace(Popen=functools.partial(_Server, report=report), DEVNULL=None)
    sys.argv = [path, grace_s, str(report), *server]
    os._exit(watchdog.main())


class _Server:
    """What the watchdog uses of `subprocess.Popen`. report: a file descriptor that the server does not inherit."""

    def __init__(self, command: list[str], *, report: int, preexec_fn: Callable[[], None], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.close(report)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.setsid()
            preexec_fn()
            _become(command)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode


def _become(command: list[str]) -> None:
    """Go on as the server, `python launch.py ARGUMENTS...`, or a fake one: `python -m MODULE ...` or `python -c CODE ...`"""
    option, program, *arguments = command[1:]
    if option.endswith("sglang_cpu/launch.py"):
        from tests.sglang_cpu import launch

        launch.set_environment()
        launch.serve([program, *arguments])
        return
    gc.enable()
    sys.argv = [option, *arguments]
    if option == "-c":
        exec(program, {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    for thread in threading.enumerate():  # as the interpreter does when a program has ended
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
