"""The user's line in errors: in a file, in a cell of a notebook, in `python -c`, and in code compiled by hand."""

from __future__ import annotations

import linecache
import subprocess
import sys
import textwrap
from types import FrameType
from typing import Any

import pytest
import torch

from popart_func.engines import scan
from popart_func.engines.tracing.source_lines import describe_line, user_line

STEP = """import torch
def step(carry, x):
    if x > 0:
        return carry, ()
    return -carry, ()
"""


def compiled(filename: str, monkeypatch: pytest.MonkeyPatch, *, with_source: bool) -> Any:
    """A step as an editor or a notebook makes it."""
    if with_source:
        monkeypatch.setitem(linecache.cache, filename, (len(STEP), None, STEP.splitlines(keepends=True), filename))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(STEP, filename, "exec"), namespace)
    return namespace["step"]


@pytest.mark.parametrize("filename", ["<ipython-input-7-abc>", "/tmp/ipykernel_12/345.py", "<cell 3>", "<string>"])
@pytest.mark.parametrize("with_source", [True, False])
def test_code_that_is_in_no_file(filename: str, with_source: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled(filename, monkeypatch, with_source=with_source)
    with pytest.raises(TypeError, match=r"^scan: the value of a tensor is read in ") as caught:
        scan(step, torch.tensor(0.0), torch.ones(3), engine="native")
    where = f" in {filename}:3: `if x > 0:`: one step" if with_source else f" in {filename}:3: one step"
    assert where in str(caught.value)


def run(program: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_python_dash_c() -> None:
    program = """
    import torch
    import popart_func as pf

    def step(carry, x):
        return (carry if x > 0 else -carry), ()

    pf.scan_lanes(step, torch.zeros(2), torch.ones(3), engine="inductor")
    """
    assert "scan_lanes: the value of a tensor is read in <string>:6" in run(program)


def test_a_cell_of_a_notebook_is_named_as_ipython_names_it() -> None:
    program = """
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    shell.run_cell("import torch, popart_func as pf", store_history=True)
    shell.run_cell('''def step(carry, x):
        return (carry if x > 0 else -carry), ()''', store_history=True)
    shell.run_cell('''try:
        pf.scan(step, torch.zeros(()), torch.ones(3), engine="inductor")
    except TypeError as error:
        print(error)''', store_history=True)
    """
    printed = run(program)
    assert "is read in Cell In[2]:2: `return (carry if x > 0 else -carry), ()`" in printed


def frame_in(filename: str, **names: Any) -> FrameType:
    """A frame that calls `made` from a file or from generated code, with this test around it."""
    namespace: dict[str, Any] = {"frame": sys._getframe, **names}
    exec(compile("def made():\n    return frame()", filename, "exec"), namespace)
    frame: FrameType = namespace["made"]()
    return frame


@pytest.mark.parametrize(
    ("filename", "names"),
    [
        (torch.__file__, {}),
        (linecache.__file__, {}),
        ("/anywhere/site-packages/other/module.py", {}),
        ("<frozen importlib._bootstrap>", {}),
        ("<@beartype(module.function) at 0x1>", {}),
        ("<eval_with_key>.3", {}),
        ("<string>", {"__file__": torch.__file__}),  # a method that a dataclass of PyTorch's has made
    ],
)
def test_lines_of_libraries_are_passed_over(filename: str, names: dict[str, str]) -> None:
    found = user_line(frame_in(filename, **names))
    assert found is not None
    assert found[0] == __file__


def test_a_line_that_is_not_known() -> None:
    assert describe_line(None) == "a line that is not known"
    assert describe_line(("/no/such/file.py", 3)) == "/no/such/file.py:3"
