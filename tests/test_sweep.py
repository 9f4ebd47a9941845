from __future__ import annotations

import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import optree
import pytest
import small_sweep
import torch
import xarray

import popart_func as pf
from popart_func import sweeps
from popart_func.sweeps import job
from popart_func.sweeps.job import Job
from popart_func.sweeps.records import Record, every, last, mean, smoothed
from popart_func.sweeps.schema import Chunk

# Annotations are enforced in the fixtures; the tests look at messages, and run long loops.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def result() -> xarray.Dataset:
    return sweeps.run(**small_sweep.arguments())


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    """Every lane's whole curve."""
    return sweeps.run(**small_sweep.arguments(record={"curve": every()}))["curve"].values


@torch.library.custom_op("test_sweep::untraceable", mutates_args=())
def untraceable(x: torch.Tensor) -> torch.Tensor:
    """Has no fake implementation, so that its shape is unknown before it has run."""
    return x.sum(-1)


@untraceable.register_vmap
def _(info, in_dims, x):
    return untraceable(x), in_dims[0]


_STREAM = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)


def _weights(seed):
    return {"w": torch.randn(3, generator=torch.Generator().manual_seed(seed))}


def _step_of(rate):
    """The least mean squares step, as the `update` of a learner."""

    def update(state, xy):
        error = (state["w"] * xy[0]).sum() - xy[1]
        return {"w": state["w"] - rate * error * xy[0]}, error.abs()

    return update


def shared_sweep(make_learner, **changes):
    """A sweep of a learner whose info is its error, all of whose lanes learn from `_STREAM`."""
    lanes = sweeps.lanes(changes.pop("seeds", range(2)), rate=[0.1, 0.01])
    arguments = {"init": _weights, "engine": "eager", "record": {"error": every(of=lambda state, info: info)}}
    return sweeps.run(make_learner, _STREAM, lanes=lanes, **(arguments | changes))


@pytest.fixture
def chunks_run(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """Each chunk that is run, as it is run."""
    seen, run = [], Job.run
    monkeypatch.setattr(Job, "run", lambda job, chunk: seen.append(chunk) or run(job, chunk))
    return seen


class TestLanes:
    def test_the_grid_is_its_coordinates(self):
        grid = sweeps.lanes([3, 1], learner=["b", "a"], beta=[0.5], alpha=[1, 2, 3])
        assert grid.sizes == {"learner": 2, "beta": 1, "alpha": 3, "seed": 2}
        dataset = grid.to_xarray()
        assert list(dataset.coords) == ["learner", "beta", "alpha", "seed"]
        assert dataset["learner"].values.tolist() == ["b", "a"]
        assert dataset["alpha"].values.tolist() == [1.0, 2.0, 3.0]
        assert dataset["seed"].values.tolist() == [3, 1]
        assert dataset["seed"].dtype == np.int64
        assert not dataset.data_vars

    def test_the_grid_can_be_printed(self):
        grid = sweeps.lanes(range(2**32 - 20, 2**32), learner=["sgd", "popart"], learning_rate=[10**-2.5, 1])
        assert repr(grid).splitlines() == [
            "Grid(learner: 2, learning_rate: 2, seed: 20)",
            "  learner        sgd, popart",
            "  learning_rate  0.00316228, 1",
            "  seed           4294967276, 4294967277, 4294967278, 4294967279, 4294967280, 4294967281, ..., 4294967295",
        ]

    def test_a_part_of_a_grid(self):
        grid = sweeps.lanes(range(5), learner=["a", "b"], alpha=[1, 2, 3], beta=[0.5])
        part = grid.sel(learner="b", alpha=[3, np.float64(1)], seed=torch.tensor([4, 0]))
        assert part == sweeps.lanes([4, 0], learner=["b"], alpha=[3, 1], beta=[0.5])
        assert grid.sel(learner=["b", "a"]).learners == ("b", "a")
        assert grid.sel(seed=3.0).seeds == (3,)
        assert isinstance(grid.sel(seed=3.0).seeds[0], int)
        assert grid.sizes["alpha"] == 3, "the grid stays as it is"

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"gamma": 1}, r"sel: the grid has the axes \['learner', 'alpha', 'seed'\], got 'gamma'"),
            ({"alpha": 0.3}, r"sel: `alpha` must be among \[1.0, 2.0\], got 0.3"),
            ({"learner": ["c"]}, r"sel: `learner` must be among \['a', 'b'\], got 'c'"),
            ({"seed": []}, r"sel: `seed` must be one or more distinct values, got \[\]"),
            ({"seed": [1, 1]}, r"sel: `seed` must be one or more distinct values, got \[1, 1\]"),
        ],
    )
    def test_what_is_no_part_of_a_grid(self, values, message):
        with pytest.raises(ValueError, match=message):
            sweeps.lanes(range(2), learner=["a", "b"], alpha=[1, 2]).sel(**values)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seeds": []}, "`seeds` must hold at least one seed, got none"),
            ({"seeds": [1, 1]}, "`seeds` must be distinct, got 1 more than once"),
            ({"seeds": [0], "alpha": []}, "`alpha` must hold at least one value, got none"),
            ({"seeds": [0], "alpha": [0.1, 0.1]}, "`alpha` must be distinct, got 0.1 more than once"),
            ({"seeds": [0], "alpha": [float("nan")]}, "`alpha` must be finite, got nan"),
            ({"seeds": [0], "sample": [1]}, "can't be called 'sample'"),
            ({"seeds": [0], "alpha": [10**400]}, "`alpha` must be finite, got inf"),
            ({"seeds": [0], "done": [1]}, "can't be called 'done', which is the sweep's own word"),
            ({"seeds": [0], "learning rate": [1]}, "name must be an identifier, got 'learning rate'"),
            ({"seeds": [-1]}, "`seeds` must be at least 0 and below 2\\*\\*32, got -1"),
            ({"seeds": [2**32]}, "`seeds` must be at least 0 and below 2\\*\\*32, got 4294967296"),
            ({"seeds": [1, np.int64(1)]}, "`seeds` must be distinct, got 1 more than once"),
            ({"seeds": [0], "learner": ["a", "a"]}, "`learner` must be distinct, got 'a' more than once"),
            ({"seeds": [0], "learner": []}, "`learner` must hold at least one name, got none"),
            ({"seeds": [0], "learner": ["../a"]}, "names in `learner` must be identifiers, got '../a'"),
        ],
    )
    def test_bad_grids(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            sweeps.lanes(**arguments)

    @pytest.mark.parametrize(
        "values", [0.1, None, ["a"], ["0.1"], "123", [True], [np.True_], [torch.tensor(True)], [1j], [[0.1]], {"a": 1}]
    )
    def test_what_is_no_axis(self, values):
        with pytest.raises(TypeError, match=r"lanes: `alpha` must be an iterable of numbers, got "):
            sweeps.lanes([0], alpha=values)

    @pytest.mark.parametrize(
        "values",
        [np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), [np.float32(0.5), Fraction(1)], (torch.tensor(0.5), 1)],
    )
    def test_numbers_of_any_kind(self, values):
        assert sweeps.lanes([0], alpha=values).axes["alpha"] == (0.5, 1.0)

    @pytest.mark.parametrize("seeds", [3, None, "12", [1.0], [True], torch.ones(2)])
    def test_what_are_no_seeds(self, seeds):
        with pytest.raises(
            TypeError, match=r"lanes: `seeds` must be an iterable of integers, such as range\(50\), got "
        ):
            sweeps.lanes(seeds)

    @pytest.mark.parametrize(("names", "message"), [(3, "iterable of names, got 3"), ([b"a"], "be strings, got b'a'")])
    def test_what_are_no_learners(self, names, message):
        with pytest.raises(TypeError, match=message):
            sweeps.lanes([0], learner=names)


class TestRun:
    def test_dimensions_are_the_grid_s(self, result):
        assert result["final"].dims == ("learner", "learning_rate", "step_size", "seed")
        assert result["curve"].dims == (*result["final"].dims, "sample")
        assert dict(result.sizes) == {"learner": 2, "learning_rate": 3, "step_size": 2, "seed": 3, "sample": 4}
        assert result["sample"].values.tolist() == [0, 3, 6, 9]
        assert result["learner"].values.tolist() == ["sgd", "popart"]
        assert result.attrs["engine"] == "eager"
        assert result.attrs["complete"] == 1

    @pytest.mark.parametrize(("rate", "beta", "seed"), [(0.01, 0.5, 2), (0.3, 0.1, 0)])
    def test_each_lane_is_the_run_that_its_labels_say(self, result, rate, beta, seed):
        arguments = small_sweep.arguments()
        learner = arguments["make_learner"]["popart"](rate, beta)
        state, errors = learner.init(arguments["init"](seed)), []
        for x, y in zip(*arguments["data"](seed), strict=True):
            state, info = learner.update(state, (x, y))
            errors.append(info.error.item())
        lane = result.sel(learner="popart", learning_rate=rate, step_size=beta, seed=seed)
        # Errors up to 1000, a vmapped lane and an unvmapped run: a few roundings of 2⁻²⁴ of them in each of 10 steps.
        np.testing.assert_allclose(lane["curve"], errors[::3], rtol=0, atol=10 * 1000 * 2**-22)
        np.testing.assert_allclose(lane["final"], np.mean(errors[-5:]), rtol=0, atol=10 * 1000 * 2**-22)

    def test_chunks_cover_each_lane_once_and_none_for_values_that_a_learner_does_not_take(self, chunks_run):
        result = sweeps.run(**small_sweep.arguments())
        lanes = [(c.learner, lane) for c in chunks_run for lane in range(c.start, c.stop)]
        assert lanes == [("sgd", lane) for lane in range(3 * 3)] + [("popart", lane) for lane in range(3 * 2 * 3)]
        sgd = result["curve"].sel(learner="sgd")
        np.testing.assert_array_equal(sgd.isel(step_size=0), sgd.isel(step_size=1))

    def test_all_chunks_have_as_many_lanes_the_last_one_too(self, monkeypatch):
        """In another number of lanes, a lane's last bits may be others."""
        scan, seen = job.scan_lanes, []

        def noted(step, state, xs, **options):
            seen.append((len(optree.tree_leaves(state)[0]), len(optree.tree_leaves(xs)[0])))
            return scan(step, state, xs, **options)

        monkeypatch.setattr(job, "scan_lanes", noted)
        sweeps.run(**small_sweep.arguments())
        assert [lanes for lanes, steps in seen if steps == small_sweep.STEPS] == 8 * [4]

    def test_a_diverged_lane_says_when(self, result):
        arguments = small_sweep.arguments(record={"curve": every()})
        curves = sweeps.run(**arguments)
        finite = np.isfinite(curves["curve"].values)
        first = np.where(finite.all(-1), -1, (~finite).argmax(-1))
        assert (first >= 0).any()
        assert (first == -1).any()
        np.testing.assert_array_equal(curves["diverged_at"], first)
        assert (curves["diverged_at"].sel(learning_rate=small_sweep.TOO_LARGE) > 0).all()

    def test_lanes_do_not_touch_each_other(self, result):
        """To the bit: with a neighbour that diverges or without, with other seeds, in another place of the grid."""
        calm = sweeps.run(**small_sweep.arguments(learning_rate=(0.02, 0.3)))
        same = {"learning_rate": 0.3}
        assert calm.sel(same)["curve"].equals(result.sel(same)["curve"])
        fewer = sweeps.run(**small_sweep.arguments(seeds=[7, 2], step_size=(0.5,)))
        same = {"seed": 2, "step_size": 0.5, "learner": "popart"}
        assert fewer.sel(same)["curve"].equals(result.sel(same)["curve"])

    def test_threads_do_not_matter(self, result):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(before % 2 + 1)
            assert sweeps.run(**small_sweep.arguments()).equals(result)
        finally:
            torch.set_num_threads(before)

    def test_one_learner_and_a_shared_stream(self):
        arguments = small_sweep.arguments(step_size=(0.1,))
        stream = arguments["data"](5)
        one = sweeps.run(**{**arguments, "make_learner": arguments["make_learner"]["popart"], "data": stream})
        assert one["final"].dims == ("learning_rate", "step_size", "seed")
        named = sweeps.run(**{**arguments, "data": lambda seed: stream})
        assert one["curve"].equals(named["curve"].sel(learner="popart", drop=True))

    def test_seeds_alone(self):
        arguments = small_sweep.arguments(lanes=sweeps.lanes(range(2)))
        with pytest.raises(ValueError, match="`make_learner` takes 'learning_rate', for which `lanes` have no values"):
            sweeps.run(**arguments)
        alone = sweeps.run(**{**arguments, "make_learner": lambda: arguments["make_learner"]["sgd"](0.01)})
        assert alone["final"].dims == ("seed",)

    def test_any_hyper_parameter_and_a_part_of_a_grid(self):
        """Adam's second moment and the statistics' lower bound; and a random half of the grid's first axis."""
        apply = pf.stateless(torch.nn.Sequential(torch.nn.Linear(2, 1)).to("meta"))

        def make(b2, scale_lb=1e-4):
            return pf.popart_learner(apply, pf.adam(0.1, b2=b2), pf.popart(1, 0.1, scale_lb), head="0")

        grid = sweeps.lanes([1], b2=[0.9, 0.99, 0.999], scale_lb=[1e-4, 1e4]).sel(b2=[0.999, 0.9])
        found = sweeps.run(**{**small_sweep.arguments(), "make_learner": make, "lanes": grid})
        assert found["final"].dims == ("b2", "scale_lb", "seed")
        assert found["b2"].values.tolist() == [0.999, 0.9]
        assert len(np.unique(found["final"])) == 4
        one = sweeps.run(**{**small_sweep.arguments(), "make_learner": make, "lanes": grid.sel(b2=0.9)})
        np.testing.assert_allclose(one["final"].values, found["final"].sel(b2=[0.9]).values, rtol=1e-5)

    def test_a_lane_has_the_dtype_asked_for(self, result):
        arguments = small_sweep.arguments(dtype=torch.float64)
        data = arguments["data"]
        double = sweeps.run(**{**arguments, "data": lambda seed: optree.tree_map(torch.Tensor.double, data(seed))})
        assert double["final"].dtype == np.float64
        kept = {"learner": "popart", "learning_rate": 0.01}
        difference = abs(double["final"].sel(kept) - result["final"].sel(kept)).max()
        assert 0 < difference < 10 * 1000 * 2**-22

    @pytest.mark.parametrize("lacks", ["matrix_exp", "untraceable"])
    def test_auto_goes_on_where_compiled_engines_lack_an_operation(self, lacks):
        arguments = small_sweep.arguments(lanes=sweeps.lanes([0, 1]), engine="auto", record={"final": last(5)})
        learner = arguments["make_learner"]["sgd"](0.01)
        operation = {"matrix_exp": lambda x: torch.linalg.matrix_exp(x[:1, None])[0, 0], "untraceable": untraceable}[
            lacks
        ]

        def update(state, batch):
            x, y = batch
            return learner.update(state, (operation(x) * x, y))

        long = tuple(leaf.repeat(50, *[1] * (leaf.ndim - 1)) for leaf in arguments["data"](0))
        arguments |= {"make_learner": lambda: pf.Learner(learner.init, update), "data": long}
        with pytest.warns(UserWarning, match=f"engine 'auto': .*{lacks}.* Going on with eager"):
            found = sweeps.run(**arguments)
        assert found.attrs["engine"] == "eager"

    def test_a_lane_can_have_random_numbers_of_its_own(self):
        """A key in the state, which is no float; lanes of one seed draw the same, those of others do not."""

        def make(learning_rate):
            def update(key, x):
                key, own = pf.random.split(key)
                return key, pf.random.normal(own) * learning_rate

            return pf.Learner(init=lambda key: key, update=update)

        grid = sweeps.lanes(range(3), learning_rate=[1, 2])
        record = {"noise": every(of=lambda state, info: info)}
        noise = sweeps.run(make, torch.zeros(4), pf.random.key, grid, record=record, chunk_size=4, quiet=True)["noise"]
        assert len(np.unique(noise.sel(learning_rate=1))) == 3 * 4
        np.testing.assert_array_equal(noise.sel(learning_rate=2), 2 * noise.sel(learning_rate=1))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1, got 0"),
            ({"workers": 0}, ValueError, "`workers` must be at least 1, got 0"),
            (
                {"workers": "horses"},
                ValueError,
                "`workers` must be None, a number, an executor, 'ray' or .*, got 'horses'",
            ),
            ({"workers": True}, TypeError, "`workers` must be an integer, got bool"),
            ({"workers": "ray://"}, ValueError, "'ray' or 'ray://host:port', got 'ray://'"),
            ({"workers": "ray://somewhere"}, ValueError, "'ray' or 'ray://host:port', got 'ray://somewhere'"),
            ({"engine": "steam"}, ValueError, "run: `engine` must be .* got 'steam'"),
            ({"device": 3}, TypeError, "run: `device` must be a torch.device or the name of one, got int"),
            ({"dtype": torch.int32}, TypeError, "`dtype` must be a torch.dtype of floats, .* got torch.int32"),
            ({"dtype": "float32"}, TypeError, "`dtype` must be a torch.dtype of floats, .* got 'float32'"),
            ({"store": 3}, TypeError, "`store` must be the path of a directory, got int"),
            ({"store": "s3://bucket/sweep"}, ValueError, "path of a local directory, got 's3://bucket/sweep'"),
            ({"lanes": {"seed": [0]}}, TypeError, "`lanes` must be a grid that `lanes` has built, got dict"),
            ({"lanes": sweeps.lanes([0]).to_xarray()}, TypeError, "grid that `lanes` has built, got Dataset"),
            (
                {"lanes": sweeps.lanes([0], learning_rate=[0.1, 1e300], step_size=[0.1])},
                ValueError,
                r"`lanes.learning_rate` must be within the range of torch.float32, got 1e\+300",
            ),
            (
                {"lanes": sweeps.lanes([0], learning_rate=[0.1], step_size=[1e-300])},
                ValueError,
                "`lanes.step_size` must be within the range of torch.float32, got 1e-300",
            ),
            ({"lanes": sweeps.lanes([0], learning_rate=[1], step_size=[1], gamma=[1])}, ValueError, "vary 'gamma'"),
            (
                {"data": lambda seed: (torch.zeros(10 + seed, 2), torch.zeros(10 + seed, 1))},
                ValueError,
                r"`data` must give .* got torch.float32 \(10, 2\) at \(0,\) for seed 0 and torch.float32 \(11, 2\) at",
            ),
            ({"data": lambda seed: [1.0]}, TypeError, "every leaf of `data` must be a tensor, got float"),
            ({"init": lambda seed: {"w": 1.0}}, TypeError, "every leaf of `init` must be a tensor, got float"),
            ({"data": None}, ValueError, "`data` must give at least one tensor, got None"),
            ({"data": lambda: 0}, TypeError, r"`data` must be a function of \(seed\), got one of \(\): too many"),
            ({"data": torch.ones(())}, ValueError, r"as its leading axis, .* got the shapes \(\)"),
            ({"data": torch.ones(0, 2)}, ValueError, r"as its leading axis, .* got the shapes \(0, 2\)"),
            (
                {"data": (torch.ones(3), torch.ones(2))},
                ValueError,
                r"as its leading axis, .* got the shapes \(3,\), \(2,\)",
            ),
            ({"init": {}}, TypeError, r"`init` must be a function of \(seed\), got dict"),
            ({"init": lambda seed: {}}, ValueError, "`init` must give at least one tensor, got {}"),
            (
                {
                    "init": lambda seed: {
                        "0.weight": torch.ones(1, 2),
                        "0.bias": torch.ones(1, dtype=(None, torch.int)[seed]),
                    }
                },
                ValueError,
                r"`init` must give .* torch.float32 \(1,\) at .* for seed 0 and torch.int32 \(1,\) at .* for seed 1",
            ),
            ({"lanes": sweeps.lanes([0], learner=["adam"])}, ValueError, "must be among .*, got 'adam'"),
            ({"make_learner": print, "lanes": sweeps.lanes([0], learner=["a"])}, ValueError, "must be a mapping"),
            ({"make_learner": {"no name": print}}, ValueError, "must be identifiers, got 'no name'"),
            ({"make_learner": 3}, TypeError, "`make_learner` must be a function, got int"),
            ({"make_learner": {}}, ValueError, "`make_learner` must hold at least one name, got none"),
            ({"make_learner": lambda learning_rate, /: 0}, TypeError, "by name, got 'learning_rate' before '/'"),
            ({"record": []}, TypeError, "`record` must be a mapping from at least one name to what is kept, got list"),
            ({"record": {3: every()}}, ValueError, "names in `record` must be identifiers, got 3"),
            ({"record": {"seed": every()}}, ValueError, "can't use the name 'seed', which is the sweep's own word"),
            ({"record": {"step_size": every()}}, ValueError, "the name 'step_size', which is a hyper-parameter"),
            ({"record": {"all": 10}}, TypeError, "functions of a series, got int for 'all'"),
            ({"record": {"all": every}}, TypeError, "every: `n` must be an integer, got Tensor"),
            ({"record": {"all": lambda series: None}}, TypeError, "must keep a tensor, got NoneType for 'all'"),
            ({"record": {"all": lambda: None}}, TypeError, r"`record\['all'\].keep` must be a function of \(series\)"),
            (
                {"record": {"all": every()._replace(of=3)}},
                TypeError,
                r"`record\['all'\].of` must be .* \(state, info\), got int",
            ),
            ({"record": {"all": every(of=lambda state, info: info)}}, TypeError, "'all' must give a tensor, got Info"),
            ({"record": {"all": every(of=lambda state, info: 1.0)}}, TypeError, "'all' must give a tensor, got float"),
            (
                {"record": {"all": lambda series: series.bfloat16()}},
                TypeError,
                "numpy has, got torch.bfloat16 for 'all'",
            ),
            ({"record": {"all": lambda series: series[0].item()}}, RuntimeError, r"\.item\(\) on a Tensor"),
            (
                {"record": {"all": every()._replace(samples=lambda steps: range(3))}},
                ValueError,
                r"`samples` of `record` 'all' must give the range .* shape \(10,\), got range\(0, 3\)",
            ),
            (
                {"record": {"a": last(2, of=lambda state, info: info.error), "a_0": last(2)}},
                ValueError,
                "'a' has a dimension 'a_0', which is another record's name",
            ),
            ({"record": {"a": every(), "b": every(2), "b_sample": last(2)}}, ValueError, "dimension 'b_sample', which"),
            ({"record": {"end": last(11)}}, ValueError, "`n` must be at most the 10 samples, got 11"),
            ({"record": {"smooth": smoothed(11)}}, ValueError, "`window` must be at most the 10 samples, got 11"),
        ],
    )
    def test_bad_arguments(self, changes, error, message):
        with pytest.raises(error, match=message):
            sweeps.run(**small_sweep.arguments(**changes))

    @pytest.mark.parametrize(
        ("made", "error", "message"),
        [
            (lambda learner: None, TypeError, r"must return a Learner\(init, update\), got NoneType"),
            (lambda learner: tuple(learner), TypeError, r"must return a Learner\(init, update\), got tuple"),
            (lambda learner: learner._replace(init=lambda: 0), TypeError, r"init` must be a function of \(params\)"),
            (lambda learner: learner._replace(init=lambda params: 3), TypeError, "must be a tensor, got int"),
            (lambda learner: learner._replace(init=lambda params: None), ValueError, "at least one tensor, got None"),
            (
                lambda learner: learner._replace(update=lambda state: 0),
                TypeError,
                r"update` must be a function of \(state, x\)",
            ),
            (
                lambda learner: learner._replace(update=lambda state, x: state),
                TypeError,
                r"update` must return \(state, info\), got LearnerState of length 3",
            ),
            (
                lambda learner: learner._replace(update=lambda state, x: (state.params, 0)),
                TypeError,
                "structure, shapes and dtypes that it took, PyTreeSpec.*LearnerState.*, got PyTreeSpec",
            ),
            (
                lambda learner: pf.Learner(lambda params: params, lambda state, x: ({**state, "0.bias": x[0]}, 0)),
                TypeError,
                r"that it took, torch.float32 \(1,\) at \('0.bias',\), got torch.float32 \(2,\) at \('0.bias',\)",
            ),
        ],
    )  # fmt: skip
    def test_a_learner_that_is_none_says_whose_mistake_it_is(self, made, error, message):
        arguments = small_sweep.arguments(lanes=sweeps.lanes([0, 1], learning_rate=[0.1]))
        sgd = arguments["make_learner"]["sgd"]
        with pytest.raises(error, match=rf"^run: .*`make_learner\(\.\.\.\)?.*{message}|^run: `make_learner` {message}"):
            sweeps.run(**{**arguments, "make_learner": lambda learning_rate: made(sgd(learning_rate))})
        with pytest.raises(error, match=r"make_learner\['mine'\]"):
            sweeps.run(**{**arguments, "make_learner": {"mine": lambda learning_rate: made(sgd(learning_rate))}})

    def test_an_error_of_pytorch_in_a_learner_says_what_was_tried(self):
        arguments = small_sweep.arguments(lanes=sweeps.lanes([0, 1], learning_rate=[0.1]))
        sgd = arguments["make_learner"]["sgd"]
        with pytest.raises(RuntimeError, match=r"\.item\(\) on a Tensor") as caught:
            sweeps.run(**{**arguments, "make_learner": lambda learning_rate: sgd(float(learning_rate))})
        assert caught.value.__notes__ == [
            "run: the first step of `make_learner(...)` ran in one lane, with hyper-parameters as 0-d tensors, "
            "under torch.vmap, where `float`, `.item()` and `if` can't read a tensor."
        ]

    @pytest.mark.parametrize(
        ("info", "got"),
        [
            (lambda info: None, "none in NoneType"),
            (lambda info: {"error": info.error}, "none in dict"),
            (lambda info: info._replace(error=3.0), "float"),
            (lambda info: info._replace(error=(info.error,)), "tuple"),
            (lambda info: info._replace(error=info.error > 0), r"torch.bool \(1,\)"),
            (lambda info: info._replace(error=info.error[:0]), r"torch.float32 \(0,\)"),
        ],
    )
    def test_a_learner_without_an_error_asks_for_a_record(self, info, got):
        arguments = small_sweep.arguments(lanes=sweeps.lanes([0, 1], learning_rate=[0.1]), record=None)
        sgd = arguments["make_learner"]["sgd"]

        def make(learning_rate):
            learner = sgd(learning_rate)

            def update(state, batch):
                state, found = learner.update(state, batch)
                return state, info(found)

            return pf.Learner(learner.init, update)

        with pytest.raises(
            TypeError, match=rf"`info.error` must be a tensor of floats, .* got {got}\. Say what to record"
        ):
            sweeps.run(**{**arguments, "make_learner": make})

    def test_names_of_hyper_parameters_and_of_dimensions(self):
        arguments = small_sweep.arguments(lanes=sweeps.lanes([0], errors_0=[0.1]))
        arguments["record"] = {"errors": last(2, of=lambda state, info: info.error)}
        sgd = arguments["make_learner"]["sgd"]
        with pytest.raises(ValueError, match="dimension 'errors_0', which is a hyper-parameter's name: rename one"):
            sweeps.run(**{**arguments, "make_learner": lambda errors_0: sgd(errors_0)})

    def test_numbers_of_numpy_count_as_numbers(self, result):
        assert sweeps.run(**small_sweep.arguments(chunk_size=np.int64(4))).equals(result)

    def test_chunks_larger_than_the_grid(self, result):
        found = sweeps.run(**small_sweep.arguments(chunk_size=10**9))
        np.testing.assert_allclose(found["final"], result["final"], rtol=1e-4)

    def test_parameters_of_a_module_are_tensors_too(self, result):
        arguments = small_sweep.arguments()
        init = arguments["init"]
        arguments["init"] = lambda seed: {name: torch.nn.Parameter(leaf) for name, leaf in init(seed).items()}
        assert sweeps.run(**arguments).equals(result)

    def test_a_result_can_be_written_to(self, result):
        for found in (result, shared_sweep(lambda rate: pf.Learner(dict, _step_of(rate)))):
            assert all(variable.values.flags.writeable for variable in found.data_vars.values())

    def test_a_learner_that_changes_its_state_in_place_is_refused(self):
        def in_place(rate):
            def update(state, xy):
                new, error = _step_of(rate)(state, xy)
                state["w"].copy_(new["w"])
                return state, error

            return pf.Learner(dict, update)

        weights = {seed: _weights(seed) for seed in (0, 1)}
        with pytest.raises(ValueError, match=r"`make_learner\(\.\.\.\)\.update` must not change `state` in place"):
            shared_sweep(in_place, seeds=[0], init=weights.get)
        assert torch.equal(weights[0]["w"], _weights(0)["w"])

    def test_a_learner_that_changes_the_stream_in_place_is_refused(self):
        def made(rate):
            return pf.Learner(dict, lambda state, xy: _step_of(rate)(state, (xy[0].mul_(0.5), xy[1])))

        before = _STREAM[0].clone()
        with pytest.raises(ValueError, match=r"`make_learner\(\.\.\.\)\.update` must not change `x` in place"):
            shared_sweep(made)
        assert torch.equal(_STREAM[0], before)

    def test_states_of_any_tree_that_optree_knows(self):
        @optree.dataclasses.dataclass(namespace="")
        class State:
            w: torch.Tensor
            nothing: None
            name: str = optree.dataclasses.field(default="w", pytree_node=False)

        def made(rate):
            def update(state, xy):
                new, error = _step_of(rate)({"w": state.w}, xy)
                return State(new["w"], None, state.name), error

            return pf.Learner(lambda params: State(params.w, None), update)

        plain = shared_sweep(lambda rate: pf.Learner(dict, _step_of(rate)))
        of_state = shared_sweep(made, init=lambda seed: State(_weights(seed)["w"], None))
        assert np.array_equal(of_state["error"], plain["error"])

    def test_states_of_a_dtype_that_numpy_lacks(self):
        def made(rate):
            def update(state, xy):
                new, error = _step_of(rate)({"w": state["w"].float()}, xy)
                return {"w": new["w"].bfloat16()}, error

            return pf.Learner(lambda params: {"w": params["w"].bfloat16()}, update)

        assert shared_sweep(made)["error"].dtype == np.float32

    def test_an_object_with_init_and_update_is_a_learner(self):
        class Agent:
            def __init__(self, rate):
                self.update = _step_of(rate)

            def init(self, params):
                return params

        assert np.array_equal(
            shared_sweep(Agent)["error"], shared_sweep(lambda rate: pf.Learner(dict, _step_of(rate)))["error"]
        )

    def test_learners_that_keep_different_things(self):
        arguments = small_sweep.arguments()
        lone = arguments["make_learner"]["popart"]

        def wide(learning_rate, step_size):
            learner = lone(learning_rate, step_size)

            def update(state, batch):
                state, info = learner.update(state, batch)
                return state, info._replace(error=info.error.expand(3))

            return pf.Learner(learner.init, update)

        arguments["make_learner"]["popart"] = wide
        arguments["record"] = {"errors": last(2, of=lambda state, info: info.error)}
        with pytest.raises(ValueError, match=r"'errors' is float32 \(1,\), but float32 \(3,\) for 'popart'"):
            sweeps.run(**arguments)


class TestRecords:
    def test_what_is_kept_of_integers_may_take_them_for_indices(self):
        """Whatever is tried of a record, it gets integers such as were seen."""

        def made(rate):
            def update(state, xy):
                state, _ = _step_of(rate)(state, xy)
                return state, xy[0].argmax()

            return pf.Learner(dict, update)

        def counts(series):
            return torch.zeros(3).scatter_add(0, series, torch.ones(len(series)))

        kept = Record(lambda state, info: info, counts, None, "how often which was the largest")
        found = shared_sweep(made, record={"counts": kept})
        expected = np.bincount(_STREAM[0].argmax(1).numpy(), minlength=3)
        assert (found["counts"] == expected).all()

    def test_each_is_what_it_says_of_the_full_curve(self, full):
        records = {"thin": every(7), "smooth": smoothed(5, 2), "end": last(4), "whole": mean()}
        found = sweeps.run(**small_sweep.arguments(record=records))
        np.testing.assert_array_equal(found["thin"], full[..., ::7])
        np.testing.assert_array_equal(found["end"], full[..., -4:].astype(float).mean(-1).astype(np.float32))
        np.testing.assert_array_equal(found["whole"], full.astype(float).mean(-1).astype(np.float32))
        windows = np.lib.stride_tricks.sliding_window_view(full.astype(float), 5, axis=-1).mean(-1)
        np.testing.assert_allclose(found["smooth"], windows[..., ::2], rtol=2**-23, atol=0)
        assert found["sample"].values.tolist() == [0, 7]
        assert found["smooth_sample"].values.tolist() == list(range(0, 6, 2))

    def test_nan_can_mean_that_there_is_no_value(self, full):
        """As where no episode has ended; infinity is a divergence still."""

        def ended(state, info):
            error = info.error[0]
            return torch.where(error > 50, error, torch.nan)

        records = {"thin": every, "smooth": partial(smoothed, 5), "end": partial(last, 4), "whole": mean}
        lanes = sweeps.lanes(range(3), learning_rate=[0.01], step_size=[0.1])
        arguments = {
            gaps: small_sweep.arguments(
                lanes=lanes, record={name: make(of=ended, gaps=gaps) for name, make in records.items()}
            )
            for gaps in (False, True)
        }
        found, plain = sweeps.run(**arguments[True]), sweeps.run(**arguments[False])
        curve = full[:, :1, :1].astype(float)
        curve = np.where(curve > 50, curve, np.nan)
        assert np.isnan(curve).any()
        assert (found["diverged_at"] == -1).all()
        assert (plain["diverged_at"] >= 0).any()
        windows = np.lib.stride_tricks.sliding_window_view(curve, 5, axis=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, where a mean has no value
            np.testing.assert_array_equal(found["thin"], curve.astype(np.float32))
            np.testing.assert_allclose(found["smooth"], np.nanmean(windows, -1), rtol=2**-22)
            np.testing.assert_allclose(found["end"], np.nanmean(curve[..., -4:], -1), rtol=2**-22)
            np.testing.assert_allclose(found["whole"], np.nanmean(curve, -1), rtol=2**-22)
        infinite = every(of=lambda state, info: info.error[0] / 0, gaps=True)
        assert (sweeps.run(**small_sweep.arguments(lanes=lanes, record={"a": infinite}))["diverged_at"] == 0).all()

    def test_gaps_are_a_part_of_what_was_asked(self, tmp_path):
        record = {"curve": every()}
        sweeps.run(**small_sweep.arguments(record=record, store=tmp_path / "store"))
        with pytest.raises(sweeps.StoreError, match="holds another sweep"):
            sweeps.run(**small_sweep.arguments(record={"curve": every(gaps=True)}, store=tmp_path / "store"))

    def test_any_quantity_and_any_function_of_a_series(self, full):
        found = sweeps.run(
            **small_sweep.arguments(
                record={
                    "worst": lambda series: series.max(),
                    "scale": last(1, of=lambda state, info: state.statistics.scale),
                    "times": Record(lambda state, info: info.error[0] > 50, lambda series: series.sum(), None, "count"),
                }
            )
        )
        np.testing.assert_array_equal(found["worst"], full.max(-1))
        assert found["scale"].dims[-1] == "scale_0"
        assert (found["scale"].sel(learner="sgd") == 1).all()
        assert (found["scale"].sel(learner="popart", learning_rate=0.01) > 10).all()
        assert found["times"].dtype == np.int64
        np.testing.assert_array_equal(found["times"], (full > 50).sum(-1))

    @pytest.mark.parametrize("make", [every, last, smoothed])
    def test_at_least_one(self, make):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            make(0)
