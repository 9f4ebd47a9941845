"""What a sweep records of each lane."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import small_sweep
import torch
from shared_stream import STREAM, shared_sweep, step_of

import popart_func as pf
from popart_func import sweeps
from popart_func.sweeps.records import Record, every, last, mean, smoothed

# Annotations are enforced in the fixtures; the tests look at messages, and run long loops.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    """Every lane's whole curve."""
    return sweeps.run(**small_sweep.arguments(record={"curve": every()}))["curve"].values


class TestRecords:
    def test_what_is_kept_of_integers_may_take_them_for_indices(self):
        """Whatever is tried of a record, it gets integers such as were seen."""

        def made(rate):
            def update(state, xy):
                state, _ = step_of(rate)(state, xy)
                return state, xy[0].argmax()

            return pf.Learner(dict, update)

        def counts(series):
            return torch.zeros(3).scatter_add(0, series, torch.ones(len(series)))

        kept = Record(lambda state, info: info, counts, None, "how often which was the largest")
        found = shared_sweep(made, record={"counts": kept})
        expected = np.bincount(STREAM[0].argmax(1).numpy(), minlength=3)
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
