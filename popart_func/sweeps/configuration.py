"""Configuration of a stored sweep: what was asked, which is compared, and its provenance, which is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from popart_func.sweeps.files import canonical, digest, read_sealed
from popart_func.sweeps.lanes_zarr import LABELS, LANES

__all__ = ["CONFIGURATION", "FORMAT", "StoreError", "attributes", "provenance", "read_configuration"]

CONFIGURATION = "configuration.json"
"""The file's name in a sweep's directory."""

FORMAT = 2
"""The format of a sweep's directory. Format 1 had checksums of its own beside the arrays."""


_PLAIN = ("engine", "device", "dtype")
"""The parts of a configuration that `attributes` repeats as plain data."""


class StoreError(OSError):
    """A directory can't be used as asked; the message says why and what to do."""


def read_configuration(path: Path) -> dict[str, Any]:
    """Reads a sweep's configuration: the entries ``configuration`` and ``provenance``.

    If ``configuration.json`` is damaged or lost, they are read from the attributes of ``lanes.zarr``, which hold both.

    Raises:
        StoreError: it is missing, of another format, or damaged, and so are the attributes.
    """
    try:
        content = read_sealed(path / CONFIGURATION) or _copied_configuration(path)
    except OSError as error:
        raise StoreError(f"{path / CONFIGURATION} can't be read: {error.strerror or error}.") from error
    if content is None:
        if not path.is_dir():
            raise StoreError(f"{path} is {'a file' if path.exists() else 'not there'}: no sweep.")
        if not (path / CONFIGURATION).exists():
            raise StoreError(f"{path / CONFIGURATION} is not there: no sweep.")
        raise StoreError(
            f"{path / CONFIGURATION} is damaged, and {LANES} has no whole copy of it: put the file back from a backup, "
            f"or move the directory away and run the sweep again."
        )
    found = content["configuration"]["format"]
    if found != FORMAT:
        raise StoreError(
            f"{path} has format {found}, written by {'an older' if found < FORMAT else 'a newer'} version of "
            f"popart_func; this one reads format {FORMAT}. Use that version, or run the sweep into another directory."
        )
    return content


def _copied_configuration(path: Path) -> dict[str, Any] | None:
    """What `attributes` wrote into ``lanes.zarr``, as `read_configuration` returns it; None unless it is whole."""
    labels, file = read_sealed(path / LABELS), path / LANES / "zarr.json"
    try:
        data = file.read_bytes()
        if labels is None or labels["files"][file.relative_to(path).as_posix()] != digest(data):
            return None
        said = json.loads(data)["attributes"]
        configuration = json.loads(said["configuration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = {*_PLAIN, "configuration", "configuration_sha256", "groups"}
    return {"configuration": configuration, "provenance": {key: said[key] for key in said if key not in known}}


def attributes(configuration: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a sweep's result: its configuration as text, the hash of that, and the rest as plain data."""
    text = canonical(configuration)
    plain = {name: configuration[name] for name in _PLAIN}
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

    Git compares a file that was touched by its bytes, after running the filter that the repository names for it (Git
    LFS is one): filters are switched off. Where one has a name for which that is impossible, the answer is yes.
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
