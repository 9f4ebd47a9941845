"""Figures of labelled arrays: curves over time with bands, and heat maps of grids of settings."""

from popart_func.sweeps.plot.curves import curves
from popart_func.sweeps.plot.heat_map import heat_map

__all__ = ["curves", "heat_map"]
