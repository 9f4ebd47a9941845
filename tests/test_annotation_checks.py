"""Annotations are enforced in all other tests, also those of functions inside functions, which share their checks."""

from __future__ import annotations

import annotation_checks
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import popart_func as pf


def test_of_a_function_of_a_module():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"popart_func\.target_statistics\.init_state"):
        pf.init_state("three")


def test_of_a_function_made_again_and_again():
    for _ in range(3):
        learner = pf.sgd_learner(lambda params, x: x @ params["0.weight"].T, pf.sgd(0.1))
        with pytest.raises(jaxtyping.TypeCheckError, match="update"):
            learner.update("state", (torch.ones(2), torch.ones(1)))
        state, _ = learner.update(learner.init({"0.weight": torch.ones(1, 2)}), (torch.ones(2), torch.ones(1)))
        assert isinstance(state, pf.LearnerState)


def made(annotation, default=0):
    """A function of one qualified name, with annotations of its own."""

    def inner(x, y=default):
        return x

    inner.__annotations__ = {"x": annotation}
    return annotation_checks.check(inner)


def test_equal_signatures_share_a_check_and_others_do_not():
    assert made(int) is made(int)
    assert made(int) is not made(float)
    assert made(Float[Tensor, "a"]) is not made(Float[Tensor, "a a"])
    assert made(int, default=[]) is not made(int, default=[]), "a list has no hash"
    made(int)(3)
    for annotation in (float, Float[Tensor, "a"]):
        with pytest.raises(Exception, match="violates type hint"):
            made(annotation)(3)


def test_functions_of_equal_code_in_two_modules_have_checks_of_their_own():
    made = []
    for module, hint in (("first", "int"), ("second", "str")):
        scope = {"__name__": module}
        exec(f"def same(x: {hint}):\n    return x", scope)
        made.append(annotation_checks.jaxtyped(typechecker=annotation_checks.check)(scope["same"]))
    assert (made[0](3), made[1]("a")) == (3, "a")
    for function, wrong in zip(made, ("a", 3), strict=True):
        with pytest.raises(jaxtyping.TypeCheckError, match="violates type hint"):
            function(wrong)
