"""Files that are either complete or not there: atomic writes, flushed to the disk; JSON with its own checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

__all__ = [
    "PARTIAL",
    "as_directory",
    "canonical",
    "differences",
    "digest",
    "flush",
    "read_sealed",
    "write_atomically",
    "write_sealed",
]

PARTIAL = ".partial-"
"""The beginning of the names of files that are still being written."""

_SEAL = "sha256"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How a URL begins, of whose slashes `Path` keeps one."""

_LONG, _SHOWN = 60, 5
"""Texts longer than the first are cut; of a list that is cut, so many values are shown as the second says."""


def as_directory(caller: str, name: str, path: str | Path) -> Path:
    """The path of a local directory, which need not exist, made absolute.

    Raises:
        TypeError, ValueError: it is no path, or one of something that is not local.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{caller}: `{name}` must be the path of a directory, got {type(path).__name__}.")
    if _URL.match(str(path)) or "\0" in str(path):
        raise ValueError(f"{caller}: `{name}` must be the path of a local directory, got {str(path)!r}.")
    return Path(path).expanduser().resolve()


def canonical(value: Any) -> str:
    """A value as JSON text that is the same for equal values, so that it can be hashed."""
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
    """Replaces a file's content: at any moment it is all old or all new; when this returns, it is on the disk."""
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
    """Reads what `write_sealed` wrote; None if there is no such file, or its checksum does not match."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    seal = content.pop(_SEAL, None)
    return content if seal == digest(canonical(content).encode()) else None


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """The differences of two trees of plain data, one line each; long values are cut down to what differs.

    >>> differences({"seeds": list(range(50)), "chunk_size": 4}, {"seeds": list(range(52)), "chunk_size": 5})
    ['chunk_size: 4 there, 5 here', 'seeds: 50 values there, 52 here, only here: 50, 51']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [
            line
            for key in keys
            for line in differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
    if there == here:
        return []
    texts = ["nothing" if value is None else json.dumps(value) for value in (there, here)]
    if max(map(len, texts)) > _LONG and isinstance(there, list) and isinstance(here, list):
        return [f"{name}: {_difference_of_lists(there, here)}"]
    if max(map(len, texts)) > _LONG:
        texts = _around_difference(*texts)
    return [f"{name}: {texts[0]} there, {texts[1]} here"]


def _difference_of_lists(there: list[Any], here: list[Any]) -> str:
    """The lengths of two lists, and the values that only one has; if both have the same, where their orders part."""
    texts = [list(map(canonical, values)) for values in (there, here)]
    found = [f"{len(there)} values there, {len(here)} here"]
    for where, own, others in (("there", texts[0], set(texts[1])), ("here", texts[1], set(texts[0]))):
        only = [text for text in own if text not in others]
        if only:
            more = f" and {len(only) - _SHOWN} more" if len(only) > _SHOWN else ""
            found.append(f"only {where}: {', '.join(only[:_SHOWN])}{more}")
    if len(found) == 1:
        one, other = next(pair for pair in zip_longest(*texts, fillvalue="nothing") if pair[0] != pair[1])
        found.append(f"the first that differs: {one} there, {other} here")
    return ", ".join(found)


def _around_difference(*texts: str) -> list[str]:
    """Two texts, cut to a piece around their first difference."""
    same = next(i for i, (one, other) in enumerate(zip_longest(*texts)) if one != other)
    start = max(0, same - _LONG // 3)
    return [
        ("..." if start else "") + text[start : start + _LONG] + ("..." if len(text) > start + _LONG else "")
        for text in texts
    ]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
