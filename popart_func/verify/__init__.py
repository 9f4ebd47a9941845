"""Checks: the claims of the papers, of the split network and of this library, tested over thousands of random seeds.

>>> outcome, = run("pop_preserves_outputs", seeds=range(100))
>>> outcome.passed, len(outcome.seeds)
(True, 100)
>>> again, = run("pop_preserves_outputs", seeds=[outcome.worst_seed])  # the worst seed, alone

A check is a pure function of a random key. It draws a network, data and statistics of any magnitude. It computes one
quantity twice, with the library and independently of the library, and returns the difference as a `Discrepancy`.
``torch.vmap(check)(keys)`` runs it for all seeds. Seed s has the key `random.key(s)`, whichever other seeds run.

**Tolerances** follow from the dtype and from the operations, and the docstring of each check gives the reason. There
are three kinds:

- A difference is divided by the sum of the absolute values that were added; one rounding then costs half an eps, and
  the roundings are counted (`discrepancy`).
- For running statistics the error bound is computed along with the statistics, update by update (`closed_form`).
- For several training steps of a network the effect of roundings is measured by disturbing the computation (`noise`).
  This is an estimate, not a bound.

**To add a check**, touch two files:

1. Write the function in the fitting module of `verify.checks`, decorate it with `check.check`, and add it to the
   module's ``CHECKS``.
2. In ``tests/support/mutants.py`` add a mutant, a broken line of the library, that the new check must notice, and add
   the check's name to the ``red`` sets of the existing mutants that it notices, too.

Modules: `check` (what a check is), `runner` (`run`), `discrepancy`, `noise`, `closed_form`, `draw` (random networks
and data), `problems` (regression problems, trained by the library and by hand), `by_hand` (the mathematics without the
library), `checks` (the checks themselves), `report` (a table and JSON), `plot` (a figure).
"""

from __future__ import annotations

from popart_func.verify.check import Check, Settings
from popart_func.verify.checks import CHECKS
from popart_func.verify.discrepancy import Discrepancy
from popart_func.verify.runner import Outcome, run

__all__ = ["CHECKS", "Check", "Discrepancy", "Outcome", "Settings", "run"]
