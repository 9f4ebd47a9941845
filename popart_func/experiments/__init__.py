"""The paper's experiments and the benchmark. Needs ``pip install 'popart-func[experiments]'``.

`regression` runs the online regression of Figure 1a and `results` writes it to disk; `search` sweeps the paper's grid
of learning rates and step sizes and `search_report` judges it; `bench` measures the engines against `peers`; `plot`
draws. Each is imported by name; importing this package imports none of them.
"""

from __future__ import annotations

from popart_func._extras import require

__all__: list[str] = []

require("popart_func.experiments", "experiments", ("cyclopts", "loky", "matplotlib", "numpy", "rich", "xarray", "zarr"))
