"""What a sweep gives: each lane is the run that its labels say, however it is run."""

from __future__ import annotations

import numpy as np
import optree
import pytest
import small_sweep
import torch
import xarray
from shared_stream import shared_sweep, step_of, weights_of

import popart_func as pf
from popart_func import sweeps
from popart_func.sweeps import job
from popart_func.sweeps.job import Job
from popart_func.sweeps.records import every, last
from popart_func.sweeps.schema import Chunk

# Annotations are enforced in the fixtures; the tests look at messages, and run long loops.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def result() -> xarray.Dataset:
    return sweeps.run(**small_sweep.arguments())


@torch.library.custom_op("test_sweep::untraceable", mutates_args=())
def untraceable(x: torch.Tensor) -> torch.Tensor:
    """Has no fake implementation, so that its shape is unknown before it has run."""
    return x.sum(-1)


@untraceable.register_vmap
def _(info, in_dims, x):
    return untraceable(x), in_dims[0]


@pytest.fixture
def chunks_run(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """Each chunk that is run, as it is run."""
    seen, run = [], Job.run
    monkeypatch.setattr(Job, "run", lambda job, chunk: seen.append(chunk) or run(job, chunk))
    return seen


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
        for found in (result, shared_sweep(lambda rate: pf.Learner(dict, step_of(rate)))):
            assert all(variable.values.flags.writeable for variable in found.data_vars.values())

    def test_states_of_any_tree_that_optree_knows(self):
        @optree.dataclasses.dataclass(namespace="")
        class State:
            w: torch.Tensor
            nothing: None
            name: str = optree.dataclasses.field(default="w", pytree_node=False)

        def made(rate):
            def update(state, xy):
                new, error = step_of(rate)({"w": state.w}, xy)
                return State(new["w"], None, state.name), error

            return pf.Learner(lambda params: State(params.w, None), update)

        plain = shared_sweep(lambda rate: pf.Learner(dict, step_of(rate)))
        of_state = shared_sweep(made, init=lambda seed: State(weights_of(seed)["w"], None))
        assert np.array_equal(of_state["error"], plain["error"])

    def test_states_of_a_dtype_that_numpy_lacks(self):
        def made(rate):
            def update(state, xy):
                new, error = step_of(rate)({"w": state["w"].float()}, xy)
                return {"w": new["w"].bfloat16()}, error

            return pf.Learner(lambda params: {"w": params["w"].bfloat16()}, update)

        assert shared_sweep(made)["error"].dtype == np.float32

    def test_an_object_with_init_and_update_is_a_learner(self):
        class Agent:
            def __init__(self, rate):
                self.update = step_of(rate)

            def init(self, params):
                return params

        assert np.array_equal(
            shared_sweep(Agent)["error"], shared_sweep(lambda rate: pf.Learner(dict, step_of(rate)))["error"]
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
