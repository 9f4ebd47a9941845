"""Tests of the checks' parts: discrepancies, random draws, noise, the closed form, runs, the command and the report."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import vmap

from popart_func import engines, pop_art, random, verify
from popart_func.cli import main
from popart_func.verify import CHECKS, Settings, closed_form, draw, noise, report, runner
from popart_func.verify.discrepancy import Discrepancy, compare, compare_to_bound, ratio, worst
from popart_func.verify.plot import errors

F32, F64 = torch.float32, torch.float64
QUICK = ["pop_preserves_outputs", "bound_holds", "batches"]


@pytest.fixture(scope="module")
def outcomes() -> list[verify.Outcome]:
    return verify.run(QUICK, seeds=range(80))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """POP that divides by zero."""
    pop = pop_art.pop
    monkeypatch.setattr(
        pop_art, "pop", lambda params, old, new: pop(params, old, new._replace(scale=torch.zeros_like(new.scale)))
    )


class TestDiscrepancy:
    def test_counts_units_in_the_last_place(self) -> None:
        one = torch.tensor([1.0, 8.0])
        above = torch.nextafter(one, torch.tensor(torch.inf))
        found = compare(above, one, one, 4, F32)
        assert found.max_ulp == 1
        assert found.max_abs == 8 * 2**-23
        assert found.error == pytest.approx(2**-23)
        assert found.allowed == 4 * 2**-24

    def test_measures_against_the_terms_where_they_cancel(self) -> None:
        difference = torch.tensor([0.0625])  # (1e6 + 0.03) − 1e6 in float32
        found = compare(difference, torch.tensor([0.03]), torch.tensor([2e6]), 2, F32)
        assert found.error < found.allowed
        assert found.max_rel > 0.5

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_what_is_not_a_number_is_as_wrong_as_can_be(self, wrong: float) -> None:
        found = compare(torch.tensor([wrong, 1.0]), torch.ones(2), torch.ones(2), 10, F32)
        assert found.max_abs == found.error == torch.inf
        assert ratio(found.error, found.allowed) == torch.inf

    def test_to_the_bit(self) -> None:
        ones = torch.ones(3)
        same, other = compare(ones, ones, ones, 0, F32), compare(ones + 2**-23, ones, ones, 0, F32)
        assert ratio(same.error, same.allowed) == 0
        assert ratio(other.error, other.allowed) == torch.inf

    def test_only_what_is_above_a_bound_counts(self) -> None:
        found = compare_to_bound(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.0]), torch.ones(2), 1, F32)
        assert found.error == found.max_abs == 0
        assert compare_to_bound(torch.tensor([2.5]), torch.tensor([2.0]), torch.ones(1), 1, F32).max_abs == 0.5

    def test_the_worst_keeps_its_own_limit(self) -> None:
        parts = [
            Discrepancy(*(torch.tensor(value, dtype=F64) for value in row))
            for row in ((9, 1, 5, 3, 10), (1, 2, 3, 2, 4))
        ]
        assert worst(*parts) == (9, 2, 5, 2, 4)

    def test_nothing_is_broadcast(self) -> None:
        with pytest.raises(
            ValueError, match=r"compare: `got` and `expected` must have the same shapes, got \(2,\) and"
        ):
            compare(torch.ones(2), torch.ones(1), torch.ones(1), 1, F32)


class TestDraws:
    @pytest.mark.parametrize("dtype", [F32, F64])
    def test_uniform_numbers_fill_the_open_interval_and_the_dtype(self, dtype: torch.dtype) -> None:
        numbers = draw.uniforms(random.key(1), dtype, many=(100, 200), one=())
        many = numbers["many"]
        assert many.dtype == numbers["one"].dtype == dtype
        assert many.shape == (100, 200)
        assert numbers["one"].shape == ()
        assert 0 < many.min() < 1e-3
        assert 1 - 1e-3 < many.max() < 1
        lowest_bits = (many * 2 ** (22 if dtype == F32 else 40)) % 1
        assert (lowest_bits > 0).float().mean() > 0.4

    def test_magnitudes_span_twelve_orders_and_tails_are_heavy(self) -> None:
        uniform = draw.uniforms(random.key(2), F64, many=(20_000,))["many"]
        magnitude = draw.magnitude(uniform)
        assert 1e-6 < magnitude.min() < 2e-6
        assert 5e5 < magnitude.max() < 1e6
        tails = draw.heavy_tailed(uniform)
        assert tails.abs().max() > 50
        assert tails.median() == pytest.approx(0.3, abs=0.05)

    def test_bounds_bind_at_both_ends_for_a_share_of_the_seeds(self) -> None:
        uniform = draw.uniforms(random.key(4), F32, scale=(4000,), bounds=(2, 4000))
        scale, bounds = draw.magnitude(uniform["scale"]), draw.bounds(uniform["bounds"])
        assert (bounds["scale_lb"] <= bounds["scale_ub"]).all()
        for share in (scale < bounds["scale_lb"], scale > bounds["scale_ub"]):
            assert 0.1 < share.float().mean() < 0.15

    def test_networks_have_the_parameters_of_their_modules(self) -> None:
        for architecture in draw.ARCHITECTURES:
            params = draw.network(random.key(3), F32, architecture)
            expected = dict(draw.modules(architecture).unified.named_parameters())
            assert list(params) == list(expected)
            assert all(params[name].shape == expected[name].shape for name in params)


class TestNoise:
    def test_what_cancels_is_measured_by_what_cancelled(self) -> None:
        x, large = torch.tensor([1.0, 2.0], dtype=F64), 1e6

        value, terms = noise.measure(lambda disturb: {"sum": disturb(disturb(x + large) - large)}, x, F32)
        torch.testing.assert_close(value["sum"], x)
        assert 0.1 * large < terms["sum"] < 2 * large

    def test_undisturbed_where_nothing_rounds(self) -> None:
        x = torch.tensor([3.0, -4.0], dtype=F64)
        value, terms = noise.measure(lambda disturb: x, x, F32)
        assert torch.equal(value, x)
        assert terms == 4

    def test_amplified_noise_is_as_many_times_larger(self) -> None:
        architecture, one = draw.ARCHITECTURES[1], torch.ones(3, dtype=F64)
        roundings = noise.roundings_per_disturbance(architecture)
        for times, expected in ((1, 1.25), (3, 1.75)):
            amplified = noise.amplify(lambda tensor: tensor * 1.25, times * roundings, architecture)
            assert torch.equal(amplified(one), expected * one)


class TestClosedForm:
    """The closed form, which the checks rely on, is compared with weights that can be written down."""

    def test_a_corrected_step_forgets_the_start(self) -> None:
        steps = _updates([[0], [0], [0]], bias_correction=True).steps[:, 0]
        # 1 / (1 + (1−β) + ...), with β = ½: one over 1, 1.5 and 1.75.
        torch.testing.assert_close(steps, torch.tensor([1, 1 / 1.5, 1 / 1.75], dtype=F64))

    def test_only_updates_of_the_task_count(self) -> None:
        updates = _updates([[0, 0], [1, 1], [0, 1]], step_size=0.25, summed=True, bias_correction=True)
        torch.testing.assert_close(updates.steps[:2], torch.tensor([[1.0, 0], [0, 1]], dtype=F64))
        # The second update of each has one target: ¼ / (1 − ¾²).
        torch.testing.assert_close(updates.steps[2], torch.full((2,), 0.25 / (1 - 0.75**2), dtype=F64))
        assert updates.step_roundings[0, 0] == 0
        assert updates.step_roundings[2, 0] > closed_form.CORRECTED_STEP_ROUNDINGS

    @pytest.mark.parametrize("dtype", [F32, F64])
    def test_what_is_right_is_allowed_and_what_is_off_by_more_is_not(self, dtype: torch.dtype) -> None:
        first = pop_art.init_state(2, dtype=dtype)
        updates = _updates([[0, 0], [1, 1], [0, 1]], dtype=dtype)
        state = first
        for targets, indices in zip(updates.targets[..., 0].to(dtype), ([0, 0], [1, 1], [0, 1]), strict=True):
            state = pop_art.art(state, targets, torch.tensor(indices), step_size=0.5)
        bounds = {"scale_lb": torch.tensor(1e-4), "scale_ub": torch.tensor(1e6)}
        right = closed_form.compare_statistics(state, first, updates, bounds, dtype)
        assert right.error <= right.allowed
        for field in ("shift", "variance", "scale"):
            value = getattr(state, field)
            wrong = state._replace(**{field: value * (1 + 200 * torch.finfo(dtype).eps)})
            found = closed_form.compare_statistics(wrong, first, updates, bounds, dtype)
            assert found.error > found.allowed, field


def _updates(indices: list[list[int]], *, step_size: float = 0.5, dtype=F32, **rules: bool) -> closed_form.Updates:
    tasks = torch.tensor(indices)
    targets = torch.arange(1, tasks.numel() + 1, dtype=dtype).reshape(tasks.shape)
    mask = closed_form.task_mask(tasks, 2)
    return closed_form.Updates.from_rules(
        targets[..., None], mask, torch.tensor(step_size, dtype=dtype), dtype, **rules
    )


class TestRun:
    def test_vmap_of_a_check_is_the_experiment(self) -> None:
        check, seeds = CHECKS["pop_preserves_outputs"], [1, 6, 11]
        settings = Settings(architecture=draw.ARCHITECTURES[1])
        found = vmap(lambda key: check.function(key, settings))(vmap(random.key)(torch.tensor(seeds)))
        (outcome,) = verify.run(check.name, seeds=seeds)
        assert outcome.seeds == seeds
        assert all(map(torch.equal, outcome.discrepancy, found))

    def test_the_worst_seed_alone_is_as_bad(self, outcomes: list[verify.Outcome]) -> None:
        for outcome in outcomes:
            (again,) = verify.run(outcome.check.name, seeds=[outcome.worst_seed])
            # Rounding may differ with the number of lanes, by a small part of the allowed error.
            assert again.ratios.item() == pytest.approx(outcome.ratios.max().item(), rel=0.5)

    def test_every_seed_is_judged(self, outcomes: list[verify.Outcome]) -> None:
        for outcome in outcomes:
            assert sorted(outcome.seeds) == list(range(80))
            assert outcome.ratios.shape == (80,)
            assert outcome.passed is True
            assert outcome.skipped is None

    @pytest.mark.usefixtures("unchecked")
    def test_chunks_change_nothing_but_rounding(self, monkeypatch: pytest.MonkeyPatch, outcomes) -> None:
        monkeypatch.setattr(runner, "CHUNK", {"cpu": 11})
        for whole, parts in zip(outcomes, verify.run(QUICK, seeds=range(80)), strict=True):
            assert whole.seeds == parts.seeds
            torch.testing.assert_close(whole.discrepancy.allowed, parts.discrepancy.allowed)
            assert ((whole.ratios - parts.ratios).abs() < 0.1).all()

    def test_float64_draws_other_digits(self) -> None:
        (outcome,) = verify.run("pop_preserves_outputs", seeds=range(40), dtype=F64)
        assert outcome.passed
        assert outcome.discrepancy.max_rel.median() < 1e-13

    def test_progress_and_threads(self) -> None:
        threads, seen = torch.get_num_threads(), []
        verify.run("bound_holds", seeds=range(8), on_progress=lambda *arguments: seen.append(arguments))
        assert seen[0] == ("bound_holds", 0, 8)
        assert seen[-1] == ("bound_holds", 8, 8)
        assert torch.get_num_threads() == threads

    @pytest.mark.usefixtures("unchecked")
    def test_everything_is_on_the_device_of_the_keys(self) -> None:
        """On the meta device, which has no values, an operation refuses a tensor that was left on the CPU."""
        keys = torch.zeros(6, 2, dtype=torch.int32, device="meta")
        settings = Settings(architecture=draw.ARCHITECTURES[1])
        for name, check in CHECKS.items():
            if name not in ("engine", "jax", "jax_bridge", "joined_ranks", "rlax"):  # they read numbers
                assert {field.device.type for field in check(keys, settings)} == {"meta"}, name

    @pytest.mark.parametrize("package", ["jax", "rlax"])
    def test_what_is_not_installed_is_skipped_and_not_passed(
        self, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        (outcome,) = verify.run("rlax", seeds=range(4))
        assert outcome.passed is None
        assert outcome.worst_seed is None
        assert re.search(rf"^{package} can't be imported \(.*\): pip install 'popart-func\[test\]'$", outcome.skipped)
        assert main(["verify", "--check", "rlax", "--seeds", "4"]) == 1

    def test_eager_is_not_held_against_itself(self) -> None:
        (outcome,) = verify.run("engine", seeds=range(4), engine="eager")
        assert outcome.passed is None
        assert outcome.skipped == "eager is the engine that the others are compared with"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"checks": "gravity"}, r"run: `checks` must be among \['split_sgd', .*got 'gravity'"),
            ({"seeds": []}, r"run: `seeds` must hold integers from 0 to 2\*\*32 - 1, got none"),
            ({"seeds": [3, -1]}, "got -1"),
            ({"dtype": torch.float16}, "run: `dtype` must be torch.float32 or torch.float64, got torch.float16"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_errors(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            verify.run(**options)

    @pytest.mark.usefixtures("unchecked")
    def test_seeds_must_be_integers(self) -> None:
        with pytest.raises(TypeError, match=r"run: `seeds` must be an iterable of integers, such as range.*got 10"):
            verify.run(seeds=10)


class TestCommand:
    def test_all_checks_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
        command = [sys.executable, "-m", "popart_func", "verify", "--seeds", "24", "--dtype", "float64", *files]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr
        # Progress: a line each half minute, where it takes that long.
        assert [line for line in process.stderr.splitlines() if " of 24 seeds: " not in line] == []
        assert max(map(len, process.stdout.splitlines()[:-2])) <= 100
        written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert written["dtype"] == "float64"
        assert written["engine"] in engines.ENGINES, "the one that ran, not 'auto'"
        assert (written["first_seed"], written["last_seed"]) == (0, 23)
        assert [entry["name"] for entry in written["checks"]] == list(CHECKS)
        for entry in written["checks"]:
            assert entry["passed"] is True or entry["skipped"]
            if entry["passed"]:
                assert entry["seeds"] == 24
                assert 0 <= entry["error"] <= entry["allowed"]
                assert entry["worst_seed"] in range(24)
                assert entry["claim"] in " ".join(process.stdout.split()) or len(entry["claim"]) > 30
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    def test_one_seed_of_one_check(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--check", "batches", "bound_holds", "--seed", "159"]) == 0
        out = capsys.readouterr().out
        assert "2 passed in" in out
        assert "offsets" not in out

    @pytest.mark.usefixtures("broken", "unchecked")
    def test_a_failure_sets_the_status_and_says_how_to_see_it_again(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "out.json"
        assert main(["verify", "--check", "pop_preserves_outputs", "batches", "--seeds", "8", "--json", str(path)]) == 1
        out = capsys.readouterr().out
        assert "FAILED" in out
        assert "again: popart-func verify --check pop_preserves_outputs --seed 0" in out
        assert "1 passed, 1 FAILED" in out
        failed, passed = json.loads(path.read_text())["checks"]
        assert failed["passed"] is False
        assert failed["max_abs"] is None, "infinite, which JSON can't say"
        assert passed["passed"] is True

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--seeds", "0"], 'Invalid value "0" for --seeds. Must be >= 1.'),
            (["--check", "batches", "gravity"], 'Invalid value "gravity" for --check. Choose from: split_sgd, '),
            (["--seeds", "1000", "--seed", "3"], "Give --seeds 1000 or --seed 3, not both."),
            (["--check"], "--check requires at least 1 element"),
            (["--dtype", "float16"], 'Invalid value "float16" for --dtype.'),
            (["--engine", "steam"], "Choose from: auto, "),
            (["--device", "nowhere"], "`device` must be one that works here"),
            (["--seed", "-1"], "Must be >= 0"),
        ],
    )
    def test_bad_values(self, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert main(["verify", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1

    def test_an_engine_that_cannot_run(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("popart_func.engines.inductor.why_not", lambda device: "no compiler.")
        assert main(["verify", "--engine", "inductor"]) == 1
        assert capsys.readouterr().err.endswith("the engine 'inductor' can't run on cpu: no compiler.\n")


class TestReport:
    def test_json_has_every_number(self, outcomes: list[verify.Outcome]) -> None:
        content = json.loads(json.dumps(report.as_json(outcomes, dtype="float32"), allow_nan=False))
        assert content["dtype"] == "float32"
        for entry, outcome in zip(content["checks"], outcomes, strict=True):
            assert entry["name"] == outcome.check.name
            assert entry["seeds"] == 80
            assert entry["max_ulp"] == float(outcome.discrepancy.max_ulp.max())
            assert entry["ratio"] == float(outcome.ratios.max())
            assert entry["ratio"] == (pytest.approx(entry["error"] / entry["allowed"]) if entry["error"] else 0)
            assert entry["passed"] is True

    def test_the_figure_shows_each_check_and_the_limit(self, outcomes: list[verify.Outcome], tmp_path: Path) -> None:
        canvas = errors(outcomes, tmp_path / "errors.png")
        exact, axes = canvas.axes
        assert [label.get_text() for label in exact.get_yticklabels()] == QUICK[::-1]
        assert axes.get_xscale() == "log"
        assert axes.get_xlim()[0] < 1 < axes.get_xlim()[1]
        shares = [bar.get_width() for bar in exact.patches]
        assert shares == pytest.approx([float((outcome.ratios == 0).double().mean()) for outcome in outcomes])
        assert shares[1] > 0, "of normalized targets most lie within the bound"

    def test_the_figure_needs_a_check_that_ran(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="errors: `outcomes` must hold at least one check that ran, got none"):
            errors(verify.run("engine", seeds=[0], engine="eager"), tmp_path / "errors.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "nowhere/errors.json"], "There is no folder nowhere."),
        (["--json", "."], ". is a folder."),
        (["--plot", "errors.txt"], "A picture ends in .png, .pdf or .svg, got errors.txt."),
    ],
)
def test_a_file_that_can_not_be_written_is_noticed_before_the_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("verify", "bench"):
        assert main([command, *words]) == 2
        assert message in capsys.readouterr().err


def test_nothing_is_drawn_of_what_was_skipped(tmp_path: Path) -> None:
    file = tmp_path / "errors.png"
    assert main(["verify", "--check", "engine", "--engine", "eager", "--seeds", "4", "--plot", str(file)]) == 1
    assert not file.exists()
