"""The package's outside: what importing it brings in, and what it exports."""

from __future__ import annotations

import subprocess
import sys

import popart_func as pf

LIGHT = """
import sys, torch, optree
before = set(sys.modules)
import popart_func
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"popart_func"}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
extras = ("jax", "jaxtyping", "matplotlib", "numpy.random", "xarray", "zarr", "rich", "cyclopts", "torch._inductor")
print(sorted(name for name in extras if name in set(sys.modules) - before))
"""


def test_importing_brings_in_torch_and_optree_only():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


def test_every_public_name_is_there():
    assert sorted(pf.__all__) == pf.__all__ or set(pf.__all__) <= set(dir(pf))
    for name in pf.__all__:
        assert getattr(pf, name) is not None
