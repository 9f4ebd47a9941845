"""The command ``popart-func``: parse, call, print; nothing else.

Exit status: 0 if everything was written and every check passed, 1 for a failure, 2 for a bad value on the command line,
130 when interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

try:
    import popart_func.experiments  # noqa: F401  # its error says which extra is missing
except ModuleNotFoundError as error:
    raise SystemExit(f"popart-func: {error}") from None

from cyclopts import App, CycloptsError

from popart_func._version import __version__
from popart_func.cli.bench import bench
from popart_func.cli.cache import cache
from popart_func.cli.reproduce import reproduce
from popart_func.cli.rl import rl
from popart_func.cli.sweep import sweep
from popart_func.cli.verify import verify
from popart_func.engines import EngineUnavailableError
from popart_func.engines.native.target import BuildError

__all__ = ["main"]

app = App(
    name="popart-func",
    help="Functional Pop-Art for PyTorch: learn targets of any magnitude.",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
for command in (reproduce, sweep, rl, bench, verify, cache):
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    Args:
        arguments: the words after the program's name; by default those of this process.

    >>> main(["--version"])
    0.1.0
    0
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"popart-func: {message}", file=sys.stderr)
            status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(error, 2)
    except (BuildError, EngineUnavailableError, ModuleNotFoundError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; nothing was written.", 130)
    return status if isinstance(status, int) else 0


def _fail(reason: object, status: int) -> int:
    print(f"popart-func: {reason}", file=sys.stderr)
    return status
