"""Every check can fail: what it guards is broken, and exactly the checks that guard it go red."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

from popart_func import verify
from popart_func.engines import available_engines


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    program = Path(__file__).with_name("mutants.py")
    process = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_unbroken_every_check_is_green(found):
    assert found[""] == []


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_exactly_the_checks_that_guard_it_go_red(found, name):
    assert set(found[name]) == mutants.MUTANTS[name].red


@pytest.mark.parametrize("name", mutants.SURROUNDINGS)
def test_other_surroundings_are_noticed(found, name):
    if "native" in name and available_engines()["native"] is not None:
        pytest.skip("needs a compiler")
    assert set(found[f"surroundings: {name}"]) == mutants.SURROUNDINGS[name][2]


def test_every_check_has_a_mutant():
    noticed = set().union(*(mutant.red for mutant in mutants.MUTANTS.values()))
    noticed |= set().union(*(red for _, _, red in mutants.SURROUNDINGS.values()))
    assert noticed == set(verify.CHECKS)
