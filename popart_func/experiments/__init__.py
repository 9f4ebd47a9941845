"""The paper's experiments, their files and their figures. Needs ``pip install 'popart-func[experiments]'``.

`regression` runs the online regression; `statistics` says what many seeds say together, `plot` draws it, `store`
writes the results to disk. Each is imported by name; importing this package imports none of them.
"""

import importlib.util

for _name in ("cyclopts", "matplotlib", "numpy", "rich", "scipy", "xarray", "zarr"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"popart_func.experiments needs {_name!r}, which is not installed: pip install 'popart-func[experiments]'",
            name=_name,
        )
