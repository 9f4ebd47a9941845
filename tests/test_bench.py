"""The benchmark's bookkeeping; never how long anything takes."""

from __future__ import annotations

import importlib.util
import json
import re

import jaxtyping
import numpy as np
import pytest

from popart_func.cli import main
from popart_func.engines import scan_lanes
from popart_func.experiments import bench, bench_plot, competitors, engine_costs, names, regression, workload_bench
from popart_func.experiments.workloads import mlp
from popart_func.models import UnifiedModel, init_lanes

ENGINES = ["eager", "jax", "jax_traced", "jax_lanes_last", "reference"]


@pytest.fixture(scope="module")
def results():
    return bench.compare([3, 2], engines=ENGINES, steps=30, repeats=2)


def test_every_engine_and_number_of_lanes_has_a_result(results):
    assert [(result.lanes, result.engine) for result in results] == [(n, e) for n in (3, 2) for e in ENGINES]
    for result in results:
        assert result.ns_per_lane_step > 0
        assert result.compile_seconds >= 0
        assert result.spread >= 0
        assert result.steps == 30


def test_what_was_measured_on_a_part_is_marked(results, monkeypatch):
    marked = {(result.lanes, result.engine): result.extrapolated for result in results}
    assert marked[3, "reference"], "two of three lanes"
    assert not marked[2, "reference"]
    assert not marked[3, "eager"]
    monkeypatch.setattr(bench, "_PART", {"eager": 10})
    (part,) = bench.compare([2], engines=["eager"], steps=30, repeats=1)
    assert part.extrapolated
    assert part.steps == 10


STEPS = 1010


@pytest.fixture(scope="module")
def expected():
    """The errors of two lanes through the first spike, by eager in float64."""
    jaxtyping.config.update("jaxtyping_disable", True)
    init, step = regression.init_and_step("popart")
    params = {name: leaf.double() for name, leaf in init_lanes(lambda: UnifiedModel(16, 10, 1), range(2)).items()}
    _, errors = scan_lanes(step, init(params), regression.streams(range(2))[:STEPS], shared=False, engine="eager")
    jaxtyping.config.update("jaxtyping_disable", False)
    return errors.numpy()


@pytest.mark.parametrize(
    "make", [competitors.reference, competitors.jax_scan, competitors.jax_traced, competitors.jax_lanes_last]
)
def test_competitors_compute_what_the_engines_do(make, expected):
    """Up to the first spike to rounding and its growth; through it to what rlax's cancelling rule gives."""
    params = {name: leaf.numpy() for name, leaf in init_lanes(lambda: UnifiedModel(16, 10, 1), range(2)).items()}
    errors = make(params, regression.streams(range(2))[:STEPS].numpy())()
    assert errors.shape == (STEPS, 2)
    np.testing.assert_allclose(errors[:1000], expected[:1000], rtol=0, atol=0.1)
    np.testing.assert_allclose(errors[1000:], expected[1000:], rtol=1e-2, atol=1.0)


def test_a_competitor_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(competitors, "STEP_SIZE", 0.3)
    with pytest.raises(RuntimeError, match="compare: jax must compute the errors that eager does, got a difference of"):
        bench.compare([2], engines=["jax"], steps=30, repeats=1)


def test_json(results):
    data = json.loads(json.dumps(bench.as_json(results)))
    assert {"engine", "device", "lanes", "ns_per_lane_step", "compile_seconds", "spread"} <= data["results"][0].keys()
    assert {"processor", "cores", "torch"} <= data["machine"].keys()


@pytest.mark.usefixtures("unchecked")
def test_costs_and_their_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(engine_costs.COST_BASE, "steps", 10)
    costs = engine_costs.costs(["eager"], values={"lanes": (1, 2)})
    assert [(cost.varied, cost.value) for cost in costs] == [("lanes", 1), ("lanes", 2)]
    assert all(cost.ns_per_lane_step > 0 for cost in costs)
    drawn = bench_plot.costs([*costs, engine_costs.Cost("eager", "width", 8, 100.0)], tmp_path / "costs.png")
    assert [axes.get_xlabel() for axes in drawn.axes] == ["lanes", "hidden width"]
    assert (tmp_path / "costs.png").stat().st_size > 0


def test_command(tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = ["bench", "--lanes", "2", "3", "--engines", "reference", "jax", "--repeats", "1", "--json", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "reference*" in printed.out
    assert len(json.loads(file.read_text())["results"]) == 4
    assert "jax on cpu, 3 lanes" in printed.err


def test_workload_names():
    assert tuple(workload_bench.WORKLOADS) == names.WORKLOAD_NAMES


@pytest.fixture
def small_workloads(monkeypatch):
    """The smallest size of each workload."""
    for name, (make, sizes) in workload_bench.WORKLOADS.items():
        monkeypatch.setitem(workload_bench.WORKLOADS, name, workload_bench.Workload(make, sizes[:1]))


def check_workloads(workloads, tmp_path, capsys):
    """`compare_workloads` refuses sides that compute something else."""
    file = tmp_path / "bench.json"
    words = ["bench", "--workloads", *workloads, "--engines", "native", "jax", "--repeats", "1", "--json", str(file)]
    assert main(words) == 0
    found = json.loads(file.read_text())["results"]
    expected = [(name, engine) for name in workloads for engine in ("native", "jax")]
    assert [(result["workload"], result["engine"]) for result in found] == expected
    assert {"device", "lanes", "ns_per_lane_step", "cpu_ns_per_lane_step", "gflops", "auto"} <= found[0].keys()
    assert "native*" in capsys.readouterr().out


@pytest.mark.usefixtures("small_workloads", "unchecked")
def test_workload_command(tmp_path, capsys):
    check_workloads(["regression"], tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("small_workloads", "unchecked")
def test_workloads_compute_in_jax_what_they_compute_here(tmp_path, capsys):
    check_workloads(names.WORKLOAD_NAMES, tmp_path, capsys)


def test_a_workload_that_computes_something_else_is_refused(monkeypatch):
    def wrong(**size):
        case = mlp.case(**size)
        return case._replace(xs=(case.xs[0], 1.01 * case.xs[1]))

    monkeypatch.setitem(workload_bench.WORKLOADS, "mlp", workload_bench.Workload(wrong, mlp.REGRESSION[:1]))
    with pytest.raises(RuntimeError, match="mlp, 4x10, batch 1, sgd: jax must compute what native does"):
        workload_bench.compare_workloads(["mlp"], engines=["native", "jax"], repeats=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "warp"], "Choose from: .*reference"),
        (["--lanes", "0"], "Must be >= 1"),
        (["--device", "nowhere"], "device"),
        (["--workloads", "chess"], "Choose from: regression, mlp, .*gru"),
        (["--workloads", "gru", "--plot", "costs.png"], "leave out --device and --plot"),
        (["--workloads", "gru", "--lanes", "7"], "--lanes: gru run in 16 lanes"),
        (["--workloads", "gru", "--engines", "reference"], "--engines with --workloads: choose from .*jax_sharded"),
        (["--engines", "jax_sharded"], "--engines without --workloads: choose from .*reference"),
    ],
)
def test_bad_usage(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_jax(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jax" else found(name, *rest))
    assert main(["bench", "--engines", "jax"]) == 1
    assert "'jax' needs jax: pip install 'popart-func[jax]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bench.compare([0], engines=["eager"]), "compare: `lanes` must be at least 1, got 0"),
        (lambda: bench.compare([1], engines=["warp"]), r"compare: `engines` must be among \[.*\], got 'warp'"),
        (lambda: workload_bench.compare_workloads(["chess"]), r"`workloads` must be among \[.*\], got 'chess'"),
        (lambda: workload_bench.compare_workloads(engines=["warp"]), r"`engines` must be among \[.*\], got 'warp'"),
        (
            lambda: workload_bench.compare_workloads(["gru"], lanes=[7]),
            r"`lanes` must be among \[16\], which gru have, got",
        ),
        (lambda: bench_plot.costs([], "x.png"), "costs: `results` must hold at least one cost"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
