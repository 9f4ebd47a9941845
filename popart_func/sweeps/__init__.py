"""Sweeps: grids of settings and seeds, run in chunks of lanes, kept in a directory that survives being killed.

Needs ``pip install 'popart-func[experiments]'``. `lanes` builds a grid, `run` runs it for any learner and any network,
`load` reads what a run has written. `records` says what is kept of each lane, `statistics` what many seeds say
together, `plot` draws it.
"""

from __future__ import annotations

from popart_func._extras import require

require(
    "popart_func.sweeps",
    "experiments",
    ("filelock", "loky", "matplotlib", "numpy", "rich", "scipy", "xarray", "zarr"),
)

from popart_func.sweeps.store import StoreError, load  # noqa: E402
from popart_func.sweeps.sweep import CHUNK_SIZE, lanes, run  # noqa: E402

__all__ = ["CHUNK_SIZE", "StoreError", "lanes", "load", "run"]
