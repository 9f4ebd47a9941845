"""Pictures of the experiments: Figure 1a, and what the engines cost. Drawn without pyplot."""

from popart_func.experiments.plot.engine_costs import costs
from popart_func.experiments.plot.figure_1a import figure

__all__ = ["costs", "figure"]
