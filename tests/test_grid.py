"""Lanes of a sweep: the grid of seeds and hyper-parameters."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from popart_func import sweeps

# Annotations are enforced in the fixtures; the tests look at messages, and run long loops.
pytestmark = pytest.mark.usefixtures("unchecked")


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
