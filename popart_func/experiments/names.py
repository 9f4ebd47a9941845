"""Names that the command line shows before an experiment is imported: nothing heavy is imported here."""

from __future__ import annotations

import enum
from typing import Any

__all__ = [
    "AGENT_NAMES",
    "ALGORITHMS",
    "COMPETITORS",
    "CRITICS",
    "HALF_DECADES",
    "JAX_COMPETITORS",
    "LABELS",
    "REWARD_SCALES",
    "REWARD_TREATMENTS",
    "SCALE_EXPERIMENTS",
    "SINGLE_AGENT_NAMES",
    "STYLES",
    "TASK_AGENT_NAMES",
    "TASK_SCALES",
    "WORKLOAD_COMPETITORS",
    "WORKLOAD_NAMES",
    "Algorithm",
]


class Algorithm(enum.Enum):
    """The paper's four algorithms."""

    sgd = "sgd"
    art = "art"
    popart = "popart"
    normalized_sgd = "normalized_sgd"


ALGORITHMS = tuple(algorithm.value for algorithm in Algorithm)
"""The names of the four algorithms."""

LABELS = {"sgd": "SGD", "art": "ART", "popart": "Pop-Art", "normalized_sgd": "normalized SGD"}
"""What people call the algorithms."""

# Okabe and Ito's colours, which the colour-blind can tell apart. Proposition 3 puts normalized SGD right on top of
# Pop-Art: its line is thin and dark inside a broad light one, so that both are seen.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#D55E00", "linewidth": 1.0, "zorder": 3},
    "art": {"color": "#009E73", "linewidth": 1.0, "zorder": 4},
    "popart": {"color": "#56B4E9", "linewidth": 3.4, "zorder": 5},
    "normalized_sgd": {"color": "#00304D", "linewidth": 0.8, "zorder": 6},
}
"""How the algorithms' lines are drawn: properties of matplotlib's lines."""

HALF_DECADES = tuple(10 ** (power / 2) for power in range(-10, 1))
"""10^-5, 10^-4.5, ..., 1: the values that the paper searched, for learning rates and for step sizes."""

JAX_COMPETITORS = ("jax", "jax_traced", "jax_lanes_last")
"""The benchmark's competitors that need JAX."""

COMPETITORS = (*JAX_COMPETITORS, "reference")
"""What the benchmark measures the engines against, see `competitors`."""

WORKLOAD_NAMES = ("regression", "mlp", "catch", "replay", "ppo", "ensemble", "conv", "gru")
"""The steps that ``popart-func bench --workloads`` measures, see `workload_bench`."""

WORKLOAD_COMPETITORS = ("jax", "jax_sharded")
"""What `workload_bench` measures the engines against: JAX on one device, and with its lanes on several."""

SCALE_EXPERIMENTS = ("bandit_scale", "catch_scale", "cartpole_scale", "mountain_car_scale", "catch_tasks")
"""bsuite's experiments with the scale of rewards, and one network that learns Catch at all scales at once: see
`reward_scales.tasks`."""

TASK_SCALES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)
"""The scales of the rewards of ``catch_tasks``, one for each task."""

REWARD_SCALES = (0.001, 0.03, 1.0, 30.0, 1000.0)
"""bsuite's scales of the rewards."""

CRITICS = ("plain", "art", "popart", "normalized")
"""What learns the values of an agent, see `agents.critics`."""

REWARD_TREATMENTS = ("clipped", "scaled")
"""What is done to the rewards of an agent with plain values, see `environments.wrappers`."""

SINGLE_AGENT_NAMES = (
    *(f"{algorithm}-{one}" for algorithm in ("q", "dqn", "ppo", "vtrace") for one in (*CRITICS, *REWARD_TREATMENTS)),
    *(f"stream-{one}" for one in ("plain", "popart", *REWARD_TREATMENTS)),
)
"""The agents of one task: an algorithm, and what it does about the size of rewards."""

TASK_AGENT_NAMES = (*(name for name in SINGLE_AGENT_NAMES if name.startswith("q-")), "q-shared")
"""The agents of ``catch_tasks``: with ``q-shared`` all tasks share one statistic."""

AGENT_NAMES = (*SINGLE_AGENT_NAMES, "q-shared")
"""All agents."""
