"""Every check can fail: what it guards is broken, one line at a time, and exactly the checks that guard it go red."""

from __future__ import annotations

import __future__
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch

from popart_func import learners, models, optim, pop_art, verify
from popart_func.engines import available_engines

# Two of the architectures: three outputs with a statistic each, in batches; and two outputs that share one.
SEEDS = [seed for seed in range(50) if seed % 4 in (1, 2)]

# They take a compiler, and hold the library against itself or against others' code; their mutants come last.
COMPILED = {"engine", "jax", "rlax"}
QUICK = [name for name in verify.CHECKS if name not in COMPILED]

SPLIT = {"split_sgd", "split_momentum", "split_adam"}
HEADS = {"pop_preserves_outputs", "fold_is_invariant"}
BOUND = {"bound_holds", "bound_is_reached"}
MOMENTS = {"moments_momentum", "moments_adam"}
EQUIVALENCE = {"proposition_3", "proposition_3_momentum"}
POPPED = {"algorithm_1", "algorithm_1_gradient", *EQUIVALENCE, *MOMENTS}
NORMALIZED = {"algorithm_1", "algorithm_1_gradient", "art_alone", "art_gradient"}
# Whatever trains with statistics from batches of targets.
TRAINED = {*NORMALIZED, "algorithm_2"}
FUNCTIONAL = {"grad_is_backward", "vjp_is_grad_tensors", "jacobian_rows"}
RUNNING = {"weighted_moments", "batches", "sequential_batch", "sample_moments", "offsets"}


class Mutant(NamedTuple):
    """A line of a function, what it becomes, and who must notice."""

    function: Callable[..., object]
    line: str
    instead: str
    red: set[str]


MUTANTS = {
    "a module keeps its own head bias": Mutant(
        models.stateless,
        "functional_call(module, {**buffers, **params}, args)",
        "functional_call(module, {**params, 'output_linear.bias': 0 * params['output_linear.bias']}, args) "
        "if 'output_linear.bias' in params else functional_call(module, dict(params), args)",
        {*SPLIT, "grad_is_backward", "vjp_is_grad_tensors", *POPPED, *TRAINED},
    ),
    "a module transposes what enters tanh": Mutant(
        models.stateless,
        "functional_call(module, {**buffers, **params}, args)",
        "functional_call(module, {n: v.flip(-1) if n.startswith('hidden0.w') else v for n, v in params.items()}, args)",
        {*SPLIT, *FUNCTIONAL, *POPPED, *TRAINED},
    ),
    "the halves are put together without the trained head": Mutant(
        models.unify,
        "return {**lower, **upper}",
        "return {**lower, **{name: 0 * value for name, value in upper.items()}}",
        {*SPLIT, *POPPED, "algorithm_2"},
    ),
    "momentum is dampened": Mutant(
        optim.trace,
        "return grad + _as(decay, grad) * moment",
        "return (1 - _as(decay, grad)) * grad + _as(decay, grad) * moment",
        {"split_momentum", "moments_momentum"},
    ),
    "the step goes uphill": Mutant(
        optim.scale_by_learning_rate,
        "-_as(rate, grad) * grad",
        "_as(rate, grad) * grad",
        {*SPLIT, "algorithm_1", "art_alone", "algorithm_2"},
    ),
    "Adam counts from one": Mutant(
        optim.scale_by_adam, "count = state.count + 1", "count = state.count + 2", {"split_adam"}
    ),
    "Adam's ε is inside the root": Mutant(
        optim.scale_by_adam,
        "first / (second.sqrt() + _as(eps, second))",
        "first / (second + _as(eps, second)).sqrt()",
        {"split_adam"},
    ),
    "the sign of POP's shift": Mutant(
        pop_art.pop,
        "(old.shift - new.shift) + (old.residue - new.residue)",
        "(new.shift - old.shift) + (new.residue - old.residue)",
        {*HEADS, *POPPED},
    ),
    "POP divides by the old scale": Mutant(
        pop_art.pop, "difference / new.scale", "difference / old.scale", {*HEADS, "pop_composes", *POPPED}
    ),
    "POP's ratio upside down": Mutant(
        pop_art.pop, "old.scale / new.scale", "new.scale / old.scale", {*HEADS, "pop_composes", *POPPED}
    ),
    "POP takes the scale that no bound has clamped": Mutant(
        pop_art.pop,
        "ratio = old.scale / new.scale",
        "ratio = old.variance.sqrt() / new.variance.sqrt()",
        {*HEADS, "pop_composes"},
    ),
    "POP forgets the residues": Mutant(pop_art.pop, " + (old.residue - new.residue)", "", HEADS),
    "POP to the same statistics rounds": Mutant(
        pop_art.pop,
        "ratio * params[bias] + difference / new.scale",
        "(old.scale * params[bias] + difference) / new.scale",
        {"pop_composes"},
    ),
    "the folded head forgets the residue": Mutant(
        pop_art.fold,
        "(params[bias] * state.scale + state.residue)",
        "params[bias] * state.scale",
        {"fold_is_invariant"},
    ),
    "unnormalize forgets the residue": Mutant(
        pop_art.unnormalize, "(values * scale + residue)", "values * scale", {"normalize_inverts"}
    ),
    "unnormalize takes the scale that no bound has clamped": Mutant(
        pop_art._broadcast_statistics,
        "statistics = state.shift, state.scale, state.residue",
        "statistics = state.shift, state.variance.sqrt(), state.residue",
        {"normalize_inverts", "bound_holds"},
    ),
    "normalize forgets the residue": Mutant(
        pop_art.normalize, "((values - shift) - residue)", "(values - shift)", {"normalize_inverts", *BOUND}
    ),
    "β_t is that of the next update": Mutant(
        pop_art.art,
        "_bias_corrected(step, count, dtype)",
        "_bias_corrected(step, count + 1, dtype)",
        {"bound_holds", "weighted_moments"},
    ),
    "β_t counts the updates of all tasks": Mutant(
        pop_art.art,
        "_bias_corrected(step, count, dtype)",
        "_bias_corrected(step, count.sum().expand(count.shape), dtype)",
        {"bound_holds", "weighted_moments"},
    ),
    "β_t cancels": Mutant(
        pop_art._bias_corrected,
        "-torch.expm1(count.to(dtype) * torch.log1p(-step))",
        "1 - (1 - step) ** count.to(dtype)",
        {"bound_holds", "weighted_moments"},
    ),
    "the variance is ν − μ²": Mutant(
        pop_art.art,
        "torch.lerp(state.variance, square, step)",
        "torch.lerp(state.variance + state.shift**2, spread + (mean + state.shift)**2, step) - (state.shift + step * mean)**2",
        {*BOUND, *RUNNING},
    ),
    "the variance lacks (1 − β)": Mutant(
        pop_art.art,
        "(spread + (1 - step) * mean.square()",
        "(spread + mean.square()",
        {"bound_is_reached", *RUNNING, *TRAINED},
    ),
    "a batch's variance is left out": Mutant(
        pop_art.art, "square = (spread + ", "square = (0 * spread + ", {*BOUND, "batches", *TRAINED}
    ),
    "the mean's rounding is lost": Mutant(
        pop_art._two_sum,
        "return total, (a - (total - b_part)) + (b - b_part)",
        "return total, torch.zeros_like(total)",
        {*BOUND, *RUNNING},
    ),
    "the scale is the variance": Mutant(
        pop_art.art, "variance.clamp(min=0).sqrt()", "variance.clamp(min=0)", {*BOUND, *RUNNING, *TRAINED}
    ),
    "an absent task moves": Mutant(
        pop_art.art,
        "torch.where(samples > 0, after, before)",
        "after",
        {"bound_holds", "weighted_moments", "batches", "sequential_batch"},
    ),
    "a sum counts as a mean": Mutant(
        pop_art.art, 'step_size * samples if reduction == "sum" else step_size', "step_size", {"batches"}
    ),
    "a sequential batch runs backwards": Mutant(
        pop_art.art, "in range(targets.shape[0]):", "in reversed(range(targets.shape[0])):", {"sequential_batch"}
    ),
    "gradients flow into the statistics": Mutant(
        pop_art.art, "targets.detach().to(dtype)", "targets.to(dtype)", {"no_statistics_gradient"}
    ),
    "the popped head is dropped": Mutant(
        learners.popart_learner,
        "params = {name: together[name] for name in state.params}",
        "params = dict(state.params)",
        POPPED,
    ),
    "the statistics move after the forward pass": Mutant(
        learners.popart_learner,
        "_descend(checked_apply, optimizer, LearnerState(params, statistics, opt_state), example)",
        "(lambda pair: (pair[0]._replace(statistics=statistics), pair[1]))"
        "(_descend(checked_apply, optimizer, LearnerState(params, state.statistics, opt_state), example))",
        POPPED,
    ),
    "ART's statistics move after the forward pass": Mutant(
        learners.art_learner,
        "_descend(apply, optimizer, state._replace(statistics=statistics), example)",
        "(lambda pair: (pair[0]._replace(statistics=statistics), pair[1]))(_descend(apply, optimizer, state, example))",
        {"art_alone", "art_gradient"},
    ),
    "Algorithm 2 takes the old scales": Mutant(
        learners.normalized_sgd_learner,
        "_rescale(statistics, _rescale(statistics, delta, example), example)",
        "_rescale(state.statistics, _rescale(state.statistics, delta, example), example)",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "Σ⁻² acts on the sum, not on each output": Mutant(
        learners.normalized_sgd_learner,
        "scaled_delta = _rescale(statistics, _rescale(statistics, delta, example), example)",
        "scaled_delta = delta / statistics.scale.square().mean()",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "Σ⁻² scales the head's gradient too": Mutant(
        learners.normalized_sgd_learner,
        "pull_back(_lift(delta, outputs, example))",
        "pull_back(_lift(scaled_delta, outputs, example))",
        {"algorithm_2", *EQUIVALENCE},
    ),
    "the loss is not averaged over the batch": Mutant(
        learners._half_square,
        " / outputs.shape[:-1].numel()",
        "",
        {*NORMALIZED, *EQUIVALENCE, *MOMENTS},
    ),
    "the head's moments stay": Mutant(
        learners.popart_learner,
        "        if rescale_moments:",
        "        if False:",
        {*MOMENTS, "proposition_3_momentum"},
    ),
    "the moments' ratio upside down": Mutant(
        learners.popart_learner,
        "state.statistics.scale / statistics.scale",
        "statistics.scale / state.statistics.scale",
        {*MOMENTS, "proposition_3_momentum"},
    ),
    "the second moment takes the ratio once": Mutant(
        optim.rescale_moments, "nu=scaled(part.nu, 2)", "nu=scaled(part.nu, 1)", {"moments_adam"}
    ),
    "moments below the head take the ratio once": Mutant(
        optim.gradient_factors, "ratio.squeeze(-1).square()", "ratio.squeeze(-1)", MOMENTS
    ),
}


def mutate(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Puts the changed function wherever the package holds the original."""
    original = mutant.function
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    assert source.count(mutant.line) == 1, f"{original.__name__} has no such line any more: {mutant.line}"
    code = compile(
        source.replace(mutant.line, mutant.instead),
        f"mutant of {original.__name__}",
        "exec",
        flags=__future__.annotations.compiler_flag,
    )
    scope: dict[str, object] = {}
    exec(code, vars(sys.modules[original.__module__]), scope)
    replace(monkeypatch, original, scope[original.__name__])


def replace(monkeypatch: pytest.MonkeyPatch, original: object, other: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("popart_func"):
            for attribute in [key for key, value in vars(module).items() if value is original]:
                monkeypatch.setattr(module, attribute, other)


def red(names: Iterable[str] = QUICK, seeds: Iterable[int] = SEEDS) -> set[str]:
    outcomes = verify.run(names, seeds=seeds)
    assert all(outcome.skipped is None for outcome in outcomes)
    return {outcome.check.name for outcome in outcomes if not outcome.passed}


@pytest.mark.usefixtures("unchecked")
def test_unbroken_every_check_is_green():
    assert red() == set()


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.usefixtures("unchecked")
def test_exactly_the_checks_that_guard_it_go_red(name, monkeypatch):
    mutate(monkeypatch, MUTANTS[name])
    assert red() == MUTANTS[name].red


class _Leak(torch.autograd.Function):
    """Adds what is not a number in one lane to all lanes: a value that crosses `torch.vmap`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x + 0 * x.sum(in_dims[0], keepdim=True), in_dims[0]


class _Alone(_Leak):
    """Changes what runs outside of `torch.vmap`, and only that."""

    @staticmethod
    def forward(x):
        return x * 1.01

    @staticmethod
    def vmap(info, in_dims, x):
        return x.clone(), in_dims[0]


@pytest.mark.parametrize(("leak", "noticed"), [(_Leak, "lane_neighbours"), (_Alone, "lane_alone")])
@pytest.mark.usefixtures("unchecked")
def test_a_lane_that_depends_on_others_is_noticed(leak, noticed, monkeypatch):
    art = pop_art.art
    replace(
        monkeypatch, art, lambda state, targets, *rest, **options: art(state, leak.apply(targets), *rest, **options)
    )
    assert red(["lane_neighbours", "lane_alone", "algorithm_1", "batches"]) == {noticed}


@pytest.mark.skipif(available_engines()["native"] is not None, reason="needs a compiler")
@pytest.mark.usefixtures("unchecked")
def test_an_engine_that_computes_something_else_is_noticed(monkeypatch):
    from popart_func.engines.native import pointwise

    names = ["engine", "algorithm_1"]
    assert red(names, range(0, 8, 2)) == set()
    monkeypatch.setitem(pointwise.UNARY, "tanh", "vector_atanh(vector_tanh({0}))")
    assert red(names, range(0, 8, 2)) == {"engine"}


@pytest.mark.usefixtures("unchecked")
def test_jax_that_computes_something_else_is_noticed(monkeypatch):
    import jax.numpy as jnp

    from popart_func.interop import lowerings

    names = ["jax", "algorithm_1"]
    assert red(names, range(0, 8, 2)) == set()
    monkeypatch.setitem(lowerings.LOWERINGS, "tanh", lambda out, x: jnp.arctan(x))
    assert red(names, range(0, 8, 2)) == {"jax"}


@pytest.mark.usefixtures("unchecked")
def test_rlax_notices_its_rule_and_its_head(monkeypatch):
    assert red(["rlax"]) == set()
    for name in ("a sum counts as a mean", "the sign of POP's shift", "the variance lacks (1 − β)"):
        with monkeypatch.context() as patch:
            mutate(patch, MUTANTS[name])
            assert red(["rlax", "normalize_inverts"]) == {"rlax"}


def test_every_check_has_a_mutant():
    noticed = set().union(*(mutant.red for mutant in MUTANTS.values()))
    assert noticed | {"lane_neighbours", "lane_alone", *COMPILED} == set(verify.CHECKS)
