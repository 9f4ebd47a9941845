"""The paper's experiments, their files and their figures. Needs ``pip install 'popart-func[experiments]'``.

`regression` runs the online regression; `statistics` says what many seeds say together, `plot` draws it, `store`
writes the results to disk. `sweep` runs grids of settings and seeds, for any learner, `records` says what they keep,
and `load` reads what they have written; `search` is the paper's grid. Each is imported by name; importing this package
imports none of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray

__all__ = ["load"]

for _name in ("cyclopts", "filelock", "loky", "matplotlib", "numpy", "rich", "scipy", "xarray", "zarr"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"popart_func.experiments needs {_name!r}, which is not installed: pip install 'popart-func[experiments]'",
            name=_name,
        )


def load(path: str | Path) -> xarray.Dataset:
    """A sweep from the directory that `sweep.run` has written, or is writing; see `chunks.load`."""
    from popart_func.experiments import chunks

    return chunks.load(path)
