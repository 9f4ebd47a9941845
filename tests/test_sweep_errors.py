"""What a sweep refuses, and whose mistake it says it is."""

from __future__ import annotations

import pytest
import small_sweep
import torch
from shared_stream import STREAM, shared_sweep, step_of, weights_of

import popart_func as pf
from popart_func import sweeps
from popart_func.sweeps.records import every, last, smoothed

# Annotations are enforced in the fixtures; the tests look at messages, and run long loops.
pytestmark = pytest.mark.usefixtures("unchecked")


class TestRefusals:
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

    def test_a_learner_that_changes_its_state_in_place_is_refused(self):
        def in_place(rate):
            def update(state, xy):
                new, error = step_of(rate)(state, xy)
                state["w"].copy_(new["w"])
                return state, error

            return pf.Learner(dict, update)

        weights = {seed: weights_of(seed) for seed in (0, 1)}
        with pytest.raises(ValueError, match=r"`make_learner\(\.\.\.\)\.update` must not change `state` in place"):
            shared_sweep(in_place, seeds=[0], init=weights.get)
        assert torch.equal(weights[0]["w"], weights_of(0)["w"])

    def test_a_learner_that_changes_the_stream_in_place_is_refused(self):
        def made(rate):
            return pf.Learner(dict, lambda state, xy: step_of(rate)(state, (xy[0].mul_(0.5), xy[1])))

        before = STREAM[0].clone()
        with pytest.raises(ValueError, match=r"`make_learner\(\.\.\.\)\.update` must not change `x` in place"):
            shared_sweep(made)
        assert torch.equal(STREAM[0], before)
