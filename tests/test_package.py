"""The package's outside: what importing it brings in, and what it exports."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import popart_func as pf

LIGHT = """
import sys, torch, optree
before = set(sys.modules)
import popart_func
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"popart_func"}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
extras = ("jax", "jaxtyping", "matplotlib", "numpy.random", "xarray", "zarr", "rich", "cyclopts", "torch._inductor")
extras += ("popart_func.distributed", "popart_func.interop", "popart_func.experiments")
print(sorted(name for name in extras if name in set(sys.modules) - before))
"""


def test_importing_brings_in_torch_and_optree_only():
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


def test_only_the_benchmark_and_the_checks_use_the_bridges():
    sources = Path(pf.__file__).parent
    users = {path.name for path in sources.rglob("*.py") if "popart_func.interop" in path.read_text(encoding="utf-8")}
    inside = {path.name for path in (sources / "interop").rglob("*.py")}
    assert users - inside <= {"competitors.py", "other_libraries.py"}


def test_every_public_name_is_there():
    assert pf.__all__ == sorted(set(pf.__all__))
    assert all(hasattr(pf, name) for name in pf.__all__)
    contract = {"art", "pop", "fold", "normalize", "unnormalize", "popart", "PopArtState", "scan", "scan_lanes"}
    assert contract | {"init_params", "init_lanes", "split", "unify", "sgd", "adam", "chain"} <= set(pf.__all__)


def test_a_saved_state_opens_again():
    learner = pf.popart_learner(pf.stateless(pf.UnifiedModel(16, 10, 1)), pf.chain(pf.adam(0.1)), pf.popart(1, 0.1))
    momentum = pf.sgd(0.1, momentum=0.5).init({"w": torch.ones(2)})
    state = (
        learner.init(pf.init_params(lambda: pf.UnifiedModel(16, 10, 1), 0)),
        momentum,
        pf.split({"output_linear.x": torch.ones(1)}),
    )
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file)
    assert type(again[0]) is pf.LearnerState
    assert pf.tree.max_difference(again, state) == 0


def test_verify_is_imported_when_it_is_first_used():
    code = "import sys, popart_func as pf; assert 'popart_func.verify' not in sys.modules; assert pf.verify.CHECKS"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'popart_func' has no attribute 'art_of_popping'"):
        _ = pf.art_of_popping
