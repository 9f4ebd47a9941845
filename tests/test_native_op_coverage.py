"""Ops that the native engine composes of simpler ones, and special functions, against PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import native_scenarios as scenarios
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from native_scenarios import difference
from op_families import FAMILIES
from torch import Tensor, nn, vmap

import popart_func as pf
from popart_func.engines import native, scan_lanes
from popart_func.engines.native.cpu import compile as cpu_compile

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # eager lacks batching rules
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),  # says that it is slow
    pytest.mark.filterwarnings("ignore:index_reduce"),  # says that it is in beta
]


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler's optimizations, which take most of the time of a kernel with so many loops."""
    flags = tuple("-O0" if flag == "-O2" else flag for flag in cpu_compile.FLAGS)
    monkeypatch.setattr(cpu_compile, "FLAGS", flags)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("quick_build")
def test_families(family: str) -> None:
    scenarios.families_agree([family], torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_optimized_in_float32(family: str) -> None:
    scenarios.families_agree([family], torch.float32)


class ConvolutionalNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        self.deeper = nn.Conv2d(3, 4, 2, stride=2)
        self.output_linear = nn.Linear(4 * 2 * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.convolution(x)), 2, stride=1)
        x = F.avg_pool2d(torch.relu(self.deeper(x)), 1)
        return self.output_linear(x.flatten(-3))


@pytest.mark.usefixtures("quick_build")
def test_a_convolutional_network_with_popart_and_adam_learns_as_in_eager() -> None:
    lanes, steps, batch = 3, 20, 4
    apply = pf.stateless(ConvolutionalNetwork())
    learner = pf.popart_learner(apply, pf.adam(1e-2), pf.popart(2, 0.1))
    params = {name: leaf.double() for name, leaf in pf.init_lanes(ConvolutionalNetwork, range(lanes)).items()}
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(steps, lanes, batch, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = x.mean((-1, -2)) * 30 + 5

    def step(state: Any, xy: Any) -> Any:
        state, info = learner.update(state, xy)
        return state, info.loss

    results = [scan_lanes(step, vmap(learner.init)(params), (x, y), engine=engine) for engine in ("native", "eager")]
    assert difference(*results) < 1e-9
    assert results[1][1][-1].mean() < 0.5 * results[1][1][0].mean()


def _refusal(step: Any, *xs: Tensor) -> str:
    with pytest.raises(native.UnsupportedError) as caught:
        scan_lanes(lambda carry, x: (carry, step(*x)), torch.zeros(2), xs, shared=True, engine="native")
    return str(caught.value)


def test_refuses_by_name_with_the_line() -> None:
    x = torch.randn(1, 30, 30)
    for step, name, why in (
        (lambda x: torch.linalg.inv(x), "linalg_inv_ex", "more than 24 rows"),
        (lambda x: torch.linalg.svdvals(x), "_linalg_svd", "no op"),
        (lambda x: torch.as_strided(x[1:], (3, 3), (1, 1)), "as_strided", "of a view"),
        (lambda x: x.bfloat16().float(), "bfloat16", "no dtype"),
        (lambda x: torch.fft.fft(x).abs(), "complex", "no dtype"),
    ):
        message = _refusal(step, x)
        assert name in message
        assert why in message
        assert "test_native_op_coverage.py:" in message


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("family", FAMILIES)
def test_nvcc_compiles(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from popart_func.engines.native import engine
    from popart_func.engines.native.cuda.source import cuda_source

    class Captured(Exception):  # noqa: N818
        pass

    def planned(scan: Any, graph: Any) -> Any:
        (tmp_path / "kernel.cu").write_text(cuda_source(plan(scan, graph), 227 * 1024, team=False).text)
        raise Captured

    plan = engine.planned
    monkeypatch.setattr(engine, "planned", planned)
    with pytest.raises(Captured):
        scenarios.families_agree([family], torch.float32)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Xptxas=-O0", "-cubin", "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run([*command, str(tmp_path / "kernel.cu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
