"""Checkpoints: any state to and from a file in the safetensors format, with readable names and without pickle.

A leaf's name is its path in the tree, such as ``"statistics.scale"`` or ``"opt_state.0.mu.head.weight"``. Any reader of
safetensors opens the file. A run that goes on from one is equal to one that was never stopped, to the bit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from popart_func.tree import PyTree

__all__ = ["load", "names", "save"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def names(tree: PyTree) -> list[str]:
    """The name of each leaf: the keys, fields and positions of its path, joined by dots.

    Raises:
        ValueError: two leaves with one name, as of the keys ``"a.b"`` and ``"a": {"b"}``; the name ``__metadata__``.

    >>> names({"params": {"w": torch.ones(1)}, "history": (torch.ones(1),)})
    ['history.0', 'params.w']
    """
    found = []
    for accessor in optree.tree_accessors(tree):
        found.append(".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor))
    twice = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise ValueError(f"checkpoints: `tree` must give each leaf a name of its own, got {twice} twice.")
    if "__metadata__" in found:
        raise ValueError("checkpoints: `tree` must not have a leaf '__metadata__', which safetensors has for itself.")
    return found


def save(tree: PyTree, path: str | os.PathLike[str]) -> None:
    """Writes a tree of tensors to a file, all of it or nothing.

    Raises:
        TypeError: a leaf that is no tensor, or of a dtype that safetensors does not have.
    """
    header: dict[str, Any] = {}
    parts, end = [], 0
    for name, leaf in zip(names(tree), optree.tree_leaves(tree), strict=True):
        if not isinstance(leaf, Tensor) or leaf.dtype not in _CODES:
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"checkpoints.save: the leaves of `tree` must be tensors, got {got} at {name!r}.")
        data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _CODES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(target)


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Reads a tree of the structure of ``like``, such as a new ``learner.init(params)``, onto its leaves' devices.

    Raises:
        ValueError: names, shapes or dtypes other than those of ``like``, or a file that is damaged.
    """
    data = bytearray(Path(path).read_bytes())
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError("its header ends before it should")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoints.load: {path} is no file of safetensors: {error}") from None
    if len(data) - start != max(ends, default=0):
        raise ValueError(f"checkpoints.load: {path} is cut off: {len(data) - start} bytes of {max(ends, default=0)}.")
    expected = dict(zip(names(like), optree.tree_leaves(like), strict=True))
    if expected.keys() != header.keys():
        raise ValueError(
            f"checkpoints.load: `like` must have the names of {path}: missing "
            f"{sorted(header.keys() - expected.keys())}, unexpected {sorted(expected.keys() - header.keys())}."
        )
    leaves = []
    for name, leaf in expected.items():
        entry = header[name]
        if _DTYPES.get(entry["dtype"]) != leaf.dtype or entry["shape"] != list(leaf.shape):
            raise ValueError(
                f"checkpoints.load: {name!r} of `like` must be {entry['dtype']} {entry['shape']}, got {leaf.dtype} "
                f"{list(leaf.shape)}."
            )
        first, last = (start + offset for offset in entry["data_offsets"])
        if not leaf.numel():
            leaves.append(torch.empty_like(leaf))
            continue
        # Copied, since a tensor of the whole buffer may lie at an address that its dtype does not allow.
        value = torch.frombuffer(bytearray(data[first:last]), dtype=leaf.dtype)
        leaves.append(value.reshape(leaf.shape).to(leaf.device))
    return optree.tree_unflatten(optree.tree_structure(like), leaves)
