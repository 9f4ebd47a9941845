from __future__ import annotations

import numpy as np
import pytest
import synthetic
import torch
from torch import Tensor

from popart_func.engines import EngineUnavailableError
from popart_func.experiments import regression
from popart_func.experiments.names import ALGORITHMS
from popart_func.experiments.regression import bits, learner, reproduce, smooth, streams
from popart_func.models import LowerLayers, UnifiedModel, UpperLayer, init_lanes


class TestStreams:
    def test_blocks_are_the_columns_of_the_draws(self) -> None:
        # numpy.random.RandomState(0).randint(0, 1024, 6) -> 684 559 629 192 835 763: a row of five, and one more.
        stream = streams([0])[:, 0]
        assert stream[[0, 1001, 2002, 3003, 4004]].tolist() == [684, 559, 629, 192, 835]
        assert stream[1] == 763

    def test_a_spike_follows_each_of_the_first_four_blocks(self) -> None:
        spikes = (streams([0, 7]) == 65535).nonzero()
        assert spikes[:, 0].unique().tolist() == [1000, 2001, 3002, 4003]
        assert len(spikes) == 8

    def test_other_numbers_are_below_1024(self) -> None:
        stream = streams(range(3))
        assert stream.dtype == torch.int32
        assert stream.shape == (5004, 3)
        assert int(stream.min()) >= 0
        assert int(stream[stream != 65535].max()) <= 1023

    def test_a_seed_has_its_stream_whatever_its_neighbours(self) -> None:
        assert torch.equal(streams([5, 2**32 - 1, 0])[:, 1], streams([2**32 - 1])[:, 0])
        assert not torch.equal(streams([0]), streams([1]))

    @pytest.mark.parametrize(
        ("seeds", "error", "message"),
        [
            ([], ValueError, r"streams: `seeds` must hold at least one seed, got none\."),
            ([0, -1], ValueError, r"streams: `seeds` must be at least 0 and below 2\*\*32, got -1\."),
            ([2**32], ValueError, r"streams: `seeds` must be at least 0 and below 2\*\*32, got 4294967296\."),
            ([3, 4, 3], ValueError, r"streams: `seeds` must be distinct, got 3 more than once\."),
            (50, TypeError, r"streams: `seeds` must be an iterable of integers, such as range\(50\), got 50\."),
            ([0.5], TypeError, r"streams: `seeds` must be an iterable of integers, .*, got \[0\.5\]\."),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_bad_seeds(self, seeds: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            streams(seeds)  # type: ignore[arg-type]

    def test_seeds_may_be_any_integers(self) -> None:
        assert torch.equal(streams(np.array([2, 5])), streams(iter([2, 5])))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bits_of_426(dtype: torch.dtype) -> None:
    assert bits(torch.tensor(426, dtype=dtype)).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0]


def test_bits_are_most_significant_first_and_all_ones_for_the_spike() -> None:
    assert bits(torch.tensor([0, 1, 2**15, 65535])).sum(-1).tolist() == [0, 1, 1, 16]
    assert bits(torch.tensor(2**15))[0] == 1
    numbers = torch.arange(2**16)
    assert torch.equal((bits(numbers) * 2 ** torch.arange(15, -1, -1)).sum(-1), numbers)


class TestSmooth:
    def test_by_hand(self) -> None:
        error = np.array([[1, 2, 3, 4, 10], [0, 0, 9, 0, 0]], dtype=np.float32)
        np.testing.assert_array_equal(smooth(error, window=3), np.float32([[2, 3, 17 / 3], [3, 3, 3]]))

    def test_length_and_dtype(self) -> None:
        assert smooth(np.ones((2, 5004), dtype=np.float32)).shape == (2, 4995)
        assert smooth(np.ones(10, dtype=np.float64)).dtype == np.float64
        assert smooth(np.ones(10, dtype=np.float32)).dtype == np.float32

    def test_is_computed_in_float64(self) -> None:
        # In float32, 2^24 + 1 is 2^24: the ones would be lost.
        error = np.float32([2**24] + [1] * 9)
        assert smooth(error)[0] == np.float32((2**24 + 9) / 10)

    def test_what_is_not_finite_stays_in_its_windows(self) -> None:
        error = np.float32([1, np.nan, 1, 1, 1])
        np.testing.assert_array_equal(smooth(error, window=2), np.float32([np.nan, np.nan, 1, 1]))

    @pytest.mark.parametrize("window", [0, 6])
    def test_bad_window(self, window: int) -> None:
        with pytest.raises(ValueError, match=rf"smooth: `window` must be between 1 and the 5 steps, got {window}\."):
            smooth(np.ones(5), window=window)


def _textbook(algorithm: str, seed: int, numbers: list[int]) -> list[float]:
    """The paper's algorithms as the paper writes them: modules, autograd, float64, and the second moment ν."""
    learning_rate, step_size = regression.SETTINGS[algorithm]
    torch.manual_seed(seed)
    lower, upper = LowerLayers(16, 10).double(), UpperLayer(10, 1).double()
    weight, bias = upper.output_linear.weight, upper.output_linear.bias
    mu, nu, sigma, errors = 0.0, 1.0, 1.0, []
    for y in numbers:
        x = torch.tensor([float(digit) for digit in f"{y:016b}"], dtype=torch.float64)
        old_mu, old_sigma = mu, sigma
        if algorithm != "sgd":
            mu, nu = (1 - step_size) * mu + step_size * y, (1 - step_size) * nu + step_size * y**2
            sigma = (nu - mu**2) ** 0.5
        if algorithm == "popart":
            weight.data *= old_sigma / sigma
            bias.data = (old_sigma * bias.data + old_mu - mu) / sigma
        output = upper(lower(x))
        raw = algorithm in ("sgd", "normalized_sgd")
        delta = (output - y if raw else output - (y - mu) / sigma).detach()
        errors.append(abs(output.item() - y if raw else sigma * output.item() + mu - y))
        below, above = list(lower.parameters()), list(upper.parameters())
        scale = sigma**-2 if algorithm == "normalized_sgd" else 1.0
        grads = torch.autograd.grad(output, below + above, delta)
        for position, (parameter, gradient) in enumerate(zip(below + above, grads, strict=True)):
            parameter.data -= learning_rate * gradient * (scale if position < len(below) else 1.0)
    return errors


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_recorded_is_what_the_paper_says(algorithm: str, unchecked: None) -> None:
    numbers = streams([3, 8])[930:1030]  # with the first spike in it
    params = {name: leaf.double() for name, leaf in init_lanes(lambda: UnifiedModel(16, 10, 1), [3, 8]).items()}
    errors, _ = regression._run(algorithm, params, numbers, "eager", None, chunks=1)
    for lane, seed in enumerate([3, 8]):
        # float64 against float64, 100 steps: rounding of 1e-16 is amplified, far less than a wrong order of things.
        np.testing.assert_allclose(errors[lane], _textbook(algorithm, seed, numbers[:, lane].tolist()), rtol=1e-8)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chunks_change_no_bit(algorithm: str, unchecked: None) -> None:
    numbers = streams([0, 1, 2])[970:1030]
    params = init_lanes(lambda: UnifiedModel(16, 10, 1), [0, 1, 2])
    calls: list[int] = []
    whole, _ = regression._run(algorithm, params, numbers, "eager", None, chunks=1)
    pieces, seconds = regression._run(
        algorithm, params, numbers, "eager", lambda _, done: calls.append(done), chunks=12
    )
    np.testing.assert_array_equal(whole, pieces)
    assert len(seconds) == 12
    assert calls == list(range(0, 61, 5))


def test_the_chunks_of_a_run_have_one_length() -> None:
    assert {len(chunk) for chunk in torch.arange(regression.STEPS).chunk(regression.CHUNKS)} == {417}


def test_one_step_function_serves_every_call() -> None:
    assert regression.init_and_step("popart")[1] is regression.init_and_step("popart")[1]


class TestReproduce:
    def test_shapes_and_coordinates(self) -> None:
        result = synthetic.dataset([3, 1, 4, 15, 9], ["popart", "sgd"])
        assert result["error"].dims == ("algorithm", "seed", "step")
        assert result["rmse"].dims == ("algorithm", "seed", "sample")
        assert dict(result.sizes) == {"algorithm": 2, "seed": 5, "step": 5004, "sample": 4995}
        assert result["error"].dtype == result["rmse"].dtype == np.float32
        assert result["algorithm"].values.tolist() == ["popart", "sgd"]
        assert result["seed"].values.tolist() == [3, 1, 4, 15, 9]
        np.testing.assert_allclose(result["learning_rate"], [10**-2.5, 10**-3.5])
        np.testing.assert_allclose(result["step_size"], [10**-0.5, np.nan])

    def test_compiling_is_told_apart_from_running(self) -> None:
        # The stand-in takes 3 s for the first of twelve chunks and 0.5 s for each of the others.
        result = synthetic.dataset(algorithms=["art"])
        assert result["compile_seconds"].item() == 2.5
        assert result["seconds"].item() == 6.0

    def test_everything_says_what_it_is(self) -> None:
        result = synthetic.dataset()
        for name, variable in result.variables.items():
            assert variable.attrs["long_name"], name
            assert "units" in variable.attrs, name
        assert result.attrs["engine"] == "eager"
        assert result.attrs["device"] == "cpu"
        assert result.attrs["dtype"] == "float32"

    def test_rmse_is_the_smoothed_error(self) -> None:
        result = synthetic.dataset()
        expected = result["error"].values[..., 995:1005].mean(-1, dtype=np.float64)
        np.testing.assert_allclose(result["rmse"].sel(sample=995), expected, rtol=1e-7)

    def test_float64(self) -> None:
        result = synthetic.dataset(dtype=torch.float64)
        assert result["error"].dtype == result["rmse"].dtype == np.float64
        assert result.attrs["dtype"] == "float64"

    def test_progress_runs_from_nothing_to_all_for_each_algorithm(self) -> None:
        calls: list[tuple[str, int]] = []
        synthetic.dataset(algorithms=["art", "sgd"], on_progress=lambda *call: calls.append(call))
        assert calls == [(name, done) for name in ("art", "sgd") for done in range(0, 5005, 417)]

    def test_the_first_error_is_that_of_the_untrained_network(self, unchecked: None) -> None:
        numbers = streams([3, 15])
        params = init_lanes(lambda: UnifiedModel(16, 10, 1), [3, 15])
        for lane, seed in enumerate([3, 15]):
            torch.manual_seed(seed)
            lower, upper = LowerLayers(16, 10), UpperLayer(10, 1)
            output: Tensor = upper(lower(bits(numbers[0, lane]).float()))
            expected = abs(output.item() - int(numbers[0, lane]))
            for algorithm in ("sgd", "popart", "normalized_sgd"):  # ART moves the output
                errors, _ = regression._run(algorithm, params, numbers[:1], "eager", None, chunks=1)
                np.testing.assert_allclose(errors[lane, 0], expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"algorithms": ["adam"]},
                ValueError,
                r"reproduce: `algorithms` must be among \['sgd', .*\], got 'adam'\.",
            ),
            (
                {"algorithms": []},
                ValueError,
                r"reproduce: `algorithms` must hold at least one of \['sgd', .*\], got none\.",
            ),
            (
                {"algorithms": ["sgd", "sgd"]},
                ValueError,
                r"reproduce: `algorithms` must be distinct, got 'sgd' more than once\.",
            ),
            (
                {"device": "nowhere"},
                ValueError,
                r"reproduce: `device` must be one that works here, got 'nowhere': .*\.",
            ),
            ({"device": "meta"}, ValueError, r"reproduce: `device` must be one that works here, got 'meta': .*\."),
            ({"engine": "steam"}, ValueError, r"`engine` must be 'auto' or one of \[.*'eager'\], got 'steam'\."),
            (
                {"dtype": torch.float16},
                ValueError,
                r"reproduce: `dtype` must be torch\.float32 or .*, got torch\.float16\.",
            ),
            ({"seeds": []}, ValueError, r"reproduce: `seeds` must hold at least one seed, got none\."),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            reproduce(**arguments)  # type: ignore[arg-type]

    def test_an_engine_that_cannot_run_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("popart_func.engines.inductor.why_not", lambda device: "no compiler.")
        with pytest.raises(EngineUnavailableError, match=r"'inductor' can't run on cpu: no compiler\."):
            reproduce([0], engine="inductor")


class TestLearner:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_takes_other_settings(self, algorithm: str) -> None:
        params = init_lanes(lambda: UnifiedModel(16, 10, 1), [0])
        params = {name: leaf[0] for name, leaf in params.items()}
        batch = (bits(torch.tensor(426)).float(), torch.tensor(426.0))
        init, update = learner(algorithm, regression.Setting(torch.tensor(0.0), torch.tensor(0.5)))
        state, _ = update(init(params), batch)
        assert torch.equal(state.params["hidden1.weight"], params["hidden1.weight"])

    def test_messages(self) -> None:
        with pytest.raises(ValueError, match=r"learner: `algorithm` must be among \[.*\], got 'adam'\."):
            learner("adam")
        with pytest.raises(ValueError, match=r"learner: `setting` must have a step_size for 'art', got None\."):
            learner("art", regression.Setting(0.1))
