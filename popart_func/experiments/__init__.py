"""Experiments: the paper's regression, its search for hyper-parameters, and the benchmark of the engines.

Needs ``pip install 'popart-func[experiments]'``. `regression` runs the online regression of Figure 1a, `plot` draws it
and `results` writes it to disk. `search` sweeps the paper's grid of learning rates and step sizes, and `search_report`
writes what it found. `bench` measures the engines against `competitors`, and `bench_plot` draws their costs. `names`
holds the names that all of them share. Importing this package imports none of them.
"""

from __future__ import annotations

from popart_func._extras import require

__all__: list[str] = []

require("popart_func.experiments", "experiments", ("cyclopts", "loky", "matplotlib", "numpy", "rich", "xarray", "zarr"))
