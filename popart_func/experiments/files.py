"""Files that are whole or not there: atomic writes, flushed to the disk, with checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "PARTIAL",
    "canonical",
    "check_directory",
    "differences",
    "digest",
    "flush",
    "read_sealed",
    "write_atomically",
    "write_sealed",
]

PARTIAL = ".partial-"
"""How the names of files begin that are still being written."""

_SEAL = "sha256"


def check_directory(caller: str, name: str, path: str | Path) -> Path:
    """The absolute path of a local directory, there or not.

    Raises:
        TypeError, ValueError: it can't be one.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{caller}: `{name}` must be the path of a directory, got {type(path).__name__}.")
    if "://" in str(path) or "\0" in str(path):
        raise ValueError(f"{caller}: `{name}` must be the path of a local directory, got {str(path)!r}.")
    return Path(path).expanduser().resolve()


def canonical(value: Any) -> str:
    """The one JSON text of a value, fit to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: bytes) -> str:
    """The sha256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file by another one: at any moment there is the old one or the new one, and then it is on the disk."""
    descriptor, aside = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    flush(path.parent)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON together with its own checksum, atomically."""
    sealed = {**content, _SEAL: digest(canonical(content).encode())}
    write_atomically(path, json.dumps(sealed, indent=1, allow_nan=False).encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote, or None if there is no such file or it is not what was written."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    seal = content.pop(_SEAL, None)
    return content if seal == digest(canonical(content).encode()) else None


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two trees of plain data differ, one line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line
            for key in keys
            for line in differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if there == here else [f"{name}: {_short(there)} there, {_short(here)} here"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    if isinstance(value, list) and len(text) > 60:
        text = f"{len(value)} values {text[:40]}...{text[-12:]}"
    return text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
