"""Every check can fail: for each broken line of the library, exactly the checks that guard it fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mutants
import mutation
import pytest
import surroundings
from filelock import FileLock

from popart_func import verify
from popart_func.engines import available_engines


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, list[str]]:
    """The failing checks by mutant; of several test processes one runs the mutants, and the others read its results."""
    if worker_id == "master":
        return run_mutants()
    file = tmp_path_factory.getbasetemp().parent / "mutants.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(run_mutants()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def run_mutants() -> dict[str, list[str]]:
    program = str(Path(__file__).parent / "support" / "run_mutants.py")
    process = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_unbroken_every_check_is_green(found):
    assert found[""] == []


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_exactly_the_checks_that_guard_it_go_red(found, name):
    assert set(found[name]) == mutants.MUTANTS[name].red


@pytest.mark.parametrize("name", surroundings.SURROUNDINGS)
def test_other_surroundings_are_noticed(found, name):
    if "native" in name and available_engines()["native"] is not None:
        pytest.skip("needs a compiler")
    assert set(found[f"surroundings: {name}"]) == surroundings.SURROUNDINGS[name][2]


def test_a_mutant_is_found_where_a_local_has_another_name():
    source = "def f(before, after):\n    share = before.scale / after.scale\n    return share * after.scale\n"
    scope = {}
    exec(mutation.code_of(source, "old.scale / new.scale", "new.scale / old.scale", set()), scope)
    old, new = SimpleNamespace(scale=2.0), SimpleNamespace(scale=8.0)
    assert scope["f"](old, new) == 4 * 8
    for line in ("old.variance / new.variance", "new.scale"):  # nowhere, and in two places
        with pytest.raises(AssertionError, match="places look like"):
            mutation.code_of(source, line, "0", set())


def test_every_check_has_a_mutant():
    noticed = set().union(*(mutant.red for mutant in mutants.MUTANTS.values()))
    noticed |= set().union(*(red for _, _, red in surroundings.SURROUNDINGS.values()))
    assert noticed == set(verify.CHECKS)
