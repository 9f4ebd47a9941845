"""All checks by name, in the order in which they are reported.

Each module holds the checks on one subject and lists them in its own ``CHECKS``: `networks` (split and unified
networks), `heads` (Proposition 1), `running_statistics` (Proposition 2 and the running moments), `algorithms`
(Algorithms 1 and 2, Proposition 3), `optimizers`, `gradients` (of learners, and the moments of optimizers), `lanes`
(and engines), `random_numbers`, `other_libraries` (JAX and rlax).
"""

from __future__ import annotations

from popart_func.verify.check import Check
from popart_func.verify.checks import (
    algorithms,
    gradients,
    heads,
    lanes,
    networks,
    optimizers,
    other_libraries,
    random_numbers,
    running_statistics,
)

__all__ = ["CHECKS"]

CHECKS: dict[str, Check] = {
    check.name: check
    for module in (
        networks,
        heads,
        running_statistics,
        algorithms,
        optimizers,
        gradients,
        random_numbers,
        lanes,
        other_libraries,
    )
    for check in module.CHECKS
}
