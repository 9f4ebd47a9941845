"""Configuration of a stored sweep: what was asked, which is compared, and its provenance, which is not."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from popart_func.sweeps.files import canonical, digest, read_sealed

__all__ = ["CONFIGURATION", "FORMAT", "StoreError", "attributes", "provenance", "read_configuration"]

CONFIGURATION = "configuration.json"
"""The file's name in a sweep's directory."""

FORMAT = 2
"""The format of a sweep's directory. Format 1 had checksums of its own beside the arrays."""


class StoreError(OSError):
    """A directory can't be used as asked; the message says why and what to do."""


def read_configuration(path: Path) -> dict[str, Any]:
    """Reads ``configuration.json`` in a sweep's directory: the entries ``configuration`` and ``provenance``.

    Raises:
        StoreError: it is missing, damaged or of another format.
    """
    content = read_sealed(path / CONFIGURATION)
    if content is None:
        if not path.is_dir():
            raise StoreError(f"{path} is {'a file' if path.exists() else 'not there'}: no sweep.")
        reason = "is damaged: move the directory away" if (path / CONFIGURATION).exists() else "is not there: no sweep"
        raise StoreError(f"{path / CONFIGURATION} {reason}.")
    found = content["configuration"]["format"]
    if found != FORMAT:
        raise StoreError(
            f"{path} has format {found}, written by {'an older' if found < FORMAT else 'a newer'} version of "
            f"popart_func; this one reads format {FORMAT}. Use that version, or run the sweep into another directory."
        )
    return content


def attributes(configuration: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a sweep's result: its configuration as text, the hash of that, and the rest as plain data."""
    text = canonical(configuration)
    plain = {name: configuration[name] for name in ("engine", "device", "dtype")}
    return {**provenance, **plain, "configuration": text, "configuration_sha256": digest(text.encode())}


def provenance() -> dict[str, Any]:
    """When and where a sweep was started, and the git revision of the current directory if it has one."""
    found: dict[str, Any] = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
    revision = _git("rev-parse", "HEAD")
    if revision:
        found["git_revision"] = revision + "-modified" * _is_modified()
    return found


def _is_modified() -> bool:
    """Whether the current directory's repository differs from its last commit.

    Git compares a file that was touched by its bytes, after running the filter that the repository names for it (Git LFS
    is one): filters are switched off. Where one has a name for which that is impossible, the answer is yes.
    """
    keys = _git("config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$").splitlines()
    if any("=" in key for key in keys):
        return True
    off = [word for key in keys for word in ("-c", f"{key}={'false' if key.endswith('.required') else ''}")]
    return bool(_git(*off, "status", "--porcelain", "--ignore-submodules=dirty"))


def _git(*words: str) -> str:
    """The output of a git command in the current directory; empty where there is no git or no repository.

    The repository may be a stranger's: none of the commands that its configuration names is run.
    """
    quiet = ("--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = {**os.environ, "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", *quiet, *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
