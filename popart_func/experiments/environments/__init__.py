"""Environments as pure functions, ``reset(key)`` and ``step(state, action, key)``: see `environment`."""

from popart_func.experiments.environments import bsuite, classic_control, wrappers
from popart_func.experiments.environments.environment import Environment, Transition, restart, step_or_reset

__all__ = ["Environment", "Transition", "bsuite", "classic_control", "restart", "step_or_reset", "wrappers"]
