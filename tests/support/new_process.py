"""Runs programs in new processes that start at once.

They are forks of a server that has imported torch and the engines and done nothing else: an import takes 1.5 s.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Program", "context", "run", "start"]


class Finished(NamedTuple):
    """What is left of a program."""

    returncode: int | None
    stdout: str
    stderr: str


class Program:
    """A program that runs in a new process."""

    def __init__(self, process: BaseProcess, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.process, self._folder = process, folder

    def wait(self, timeout: float) -> Finished:
        """What it has printed when it ends; after the timeout, in seconds, it is killed and has no return code."""
        self.process.join(timeout)
        code = self.process.exitcode
        self.kill()
        with self._folder as folder:
            return Finished(code, *((Path(folder) / name).read_text() for name in ("stdout", "stderr")))

    def kill(self) -> None:
        """Ends it, if it still runs."""
        self.process.kill()
        self.process.join()


def context() -> ForkServerContext:
    """Makes processes that have imported torch and the engines."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["popart_func.engines", "torch.distributed"])
    return found


def start(program: str, arguments: list[str] | None = None, environment: dict[str, str] | None = None) -> Program:
    """Starts a program.

    Args:
        program: its source.
        arguments: its ``sys.argv[1:]``.
        environment: variables beside or instead of those of this process.
    """
    folder = tempfile.TemporaryDirectory()
    process = context().Process(
        target=_main, args=(program, arguments or [], {**os.environ, **(environment or {})}, folder.name)
    )
    process.start()
    return Program(process, folder)


def run(program: str, *, timeout: float = 120, **options: Any) -> Finished:
    """Starts a program and waits until it ends; ``options`` as those of `start`."""
    return start(program, **options).wait(timeout)


def _main(program: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
