"""Pictures: curves over time with bands, heat maps of grids, and what the engines cost. Drawn without pyplot."""

from popart_func.experiments.plot.engine_costs import costs
from popart_func.experiments.plot.grids import heat_map
from popart_func.experiments.plot.lines import curves, figure

__all__ = ["costs", "curves", "figure", "heat_map"]
