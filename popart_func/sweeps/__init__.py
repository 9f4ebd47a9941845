"""Sweeps: grids of settings and seeds, run in chunks of lanes, kept in a directory that survives being killed.

Needs ``pip install 'popart-func[experiments]'``. `lanes` builds a grid, `run` runs it for any learner and any network,
`load` reads what a run has written. `records` chooses what is kept of each lane, `statistics` summarises many seeds,
`plot` draws, `export` makes runs of the lanes for other programs.
"""

from __future__ import annotations

from popart_func._extras import require

require(
    "popart_func.sweeps",
    "experiments",
    ("cloudpickle", "filelock", "loky", "matplotlib", "numpy", "rich", "scipy", "xarray", "zarr"),
)

from popart_func.sweeps.configuration import StoreError  # noqa: E402
from popart_func.sweeps.grid import Grid, lanes  # noqa: E402
from popart_func.sweeps.store import load  # noqa: E402
from popart_func.sweeps.sweep import CHUNK_SIZE, run  # noqa: E402

__all__ = ["CHUNK_SIZE", "Grid", "StoreError", "lanes", "load", "run"]
