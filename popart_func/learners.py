"""Learners: one step of regression on targets of any magnitude, by SGD, ART, Pop-Art or normalized SGD.

State: LearnerState(params, statistics, opt_state)
init:   learner.init(params) -> LearnerState
update: learner.update(state, batch) -> (LearnerState, Info)

`sgd_learner` regresses on the raw targets, `art_learner` on normalized ones. `popart_learner` also preserves its
outputs (Algorithm 1). `normalized_sgd_learner` makes the same predictions by scaling a gradient instead of the head
(Algorithm 2). All are pure and written for one lane; `torch.vmap` over states, batches and hyper-parameters runs
thousands.

``apply(params, x)`` gives the outputs of the network: ``[outputs]`` for one example, ``[batch, outputs]`` for a batch.
A batch is ``(x, y)`` or ``(x, y, indices)``. Without indices, y has a target for every output; with a single output, y
may lack the last axis. With indices, each example has one target, for the output that ``indices`` names.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithms 1 and 2, Proposition 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp

from popart_func import optim
from popart_func._checks import check_head_name, check_params
from popart_func._typing import Float, Num
from popart_func.models import Params, SplitParams, split, unify
from popart_func.optim import GradientTransformation, apply_updates
from popart_func.pop_art import PopArt, PopArtState, init_state, normalize, unnormalize

__all__ = [
    "Apply",
    "Batch",
    "Info",
    "Learner",
    "LearnerState",
    "art_learner",
    "normalized_sgd_learner",
    "popart_learner",
    "sgd_learner",
]

Apply = Callable[[Params, Any], Tensor]
"""``apply(params, x)`` -> the head's outputs, ``[..., outputs]``."""

Batch = tuple[Any, ...]
"""``(x, y)`` or ``(x, y, indices)``."""


class LearnerState(NamedTuple):
    """What the next step needs. All learners have the same; with SGD the statistics stay at 0 and 1.

    Attributes:
        params: the flat parameters of the network.
        statistics: the statistics of the targets.
        opt_state: the state of the optimizer.
    """

    params: dict[str, Tensor]
    statistics: PopArtState
    opt_state: Any


class Info(NamedTuple):
    """What a person looks at, measured after ART and POP of this batch and before its gradient step.

    Attributes:
        loss: half squared error of the normalized prediction, summed over outputs, averaged over the batch; 0-d.
        prediction: f(x), unnormalized, in the shape of the targets.
        target: y, unnormalized.
        error: ``|f(x) − y|``, unnormalized, without the rounding of a large shift.
        normalized_prediction: ``(f(x) − μ) / σ``.
        normalized_target: ``(y − μ) / σ``.
    """

    loss: Float[Tensor, "*lanes"]
    prediction: Float[Tensor, "..."]
    target: Num[Tensor, "..."]
    error: Float[Tensor, "..."]
    normalized_prediction: Float[Tensor, "..."]
    normalized_target: Float[Tensor, "..."]


class Learner(NamedTuple):
    """A pair of pure functions: ``init(params) -> state``, ``update(state, batch) -> (state, info)``."""

    init: Callable[[Params], LearnerState]
    update: Callable[[LearnerState, Batch], tuple[LearnerState, Info]]


def sgd_learner(apply: Apply, optimizer: GradientTransformation) -> Learner:
    """Regression on the raw targets, the baseline for the other learners.

    Args:
        apply: ``apply(params, x)`` -> outputs.
        optimizer: such as `optim.sgd(0.01)`.

    >>> learner = sgd_learner(lambda params, x: x @ params["weight"].T, optim.sgd(0.5))
    >>> state = learner.init({"weight": torch.zeros(1, 2)})
    >>> state, info = learner.update(state, (torch.tensor([1.0, 0.0]), torch.tensor([4.0])))
    >>> info.loss, state.params["weight"]
    (tensor(8.), tensor([[2., 0.]]))
    """

    def init(params: Params) -> LearnerState:
        check_params("sgd_learner", params)
        some = next(iter(params.values()))
        statistics = init_state(1, dtype=some.dtype, device=some.device)
        return LearnerState(dict(params), statistics, optimizer.init(dict(params)))

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        return _descend(apply, optimizer, state, _unpack("sgd_learner", batch))

    return Learner(init, update)


def art_learner(apply: Apply, optimizer: GradientTransformation, popart: PopArt) -> Learner:
    """ART alone: regression on normalized targets, without POP, so that new statistics move every prediction.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs.
        optimizer: such as `optim.sgd(0.01)`.
        popart: the statistics, see `pop_art.popart`.
    """

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("art_learner", batch)
        statistics = _move_statistics(popart, state.statistics, example)
        return _descend(apply, optimizer, state._replace(statistics=statistics), example)

    return Learner(_init_with("art_learner", popart, optimizer), update)


def popart_learner(
    apply: Apply,
    optimizer: GradientTransformation,
    popart: PopArt,
    *,
    head: str = "output_linear",
    rescale_moments: bool | Literal["head", "all"] = True,
) -> Learner:
    """Pop-Art (Algorithm 1): normalized targets, and POP, so that new statistics move no prediction.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs.
        optimizer: such as `optim.adam(1e-3)`.
        popart: the statistics, see `pop_art.popart`.
        head: the name of the last linear layer in the parameters, such as ``"critic.head"``.
        rescale_moments: which of the optimizer's moments follow the statistics into the new units
            (`optim.rescale_moments`). ``"head"`` or True: those of the head, which makes momentum equal to that of
            Algorithm 2. ``"all"``: also those below the head, as if all earlier targets had been normalized by the new
            statistics; for one statistic only. False: none.

    Raises:
        ValueError: an unknown ``rescale_moments``, or ``"all"`` with several statistics.

    >>> from popart_func.models import UnifiedModel, init_params, stateless
    >>> from popart_func.pop_art import popart
    >>> learner = popart_learner(stateless(UnifiedModel(16, 10, 1)), optim.sgd(0.01), popart(1, step_size=0.1))
    >>> state = learner.init(init_params(lambda: UnifiedModel(16, 10, 1), seed=0))
    >>> state, info = learner.update(state, (torch.ones(16), torch.tensor([1000.0])))
    >>> state.statistics.shift
    tensor([100.])
    """
    checked_apply = _with_checked_head("popart_learner", apply, head)
    if rescale_moments not in (True, False, "head", "all"):
        raise ValueError(f"popart_learner: `rescale_moments` must be a bool, 'head' or 'all', got {rescale_moments!r}.")

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("popart_learner", batch)
        lower, upper = split(state.params, head)
        tasks = _tasks(state.statistics, example)
        popped, statistics = popart.update(upper, state.statistics, example.y, tasks)
        opt_state = state.opt_state
        if rescale_moments:
            ratio = state.statistics.scale / statistics.scale
            factors = optim.gradient_factors(ratio, upper, lower if rescale_moments == "all" else ())
            opt_state = optim.rescale_moments(opt_state, factors)
        together = unify(SplitParams(lower, popped))
        params = {name: together[name] for name in state.params}
        return _descend(checked_apply, optimizer, LearnerState(params, statistics, opt_state), example)

    return Learner(_init_with("popart_learner", popart, optimizer, head), update)


def normalized_sgd_learner(
    apply: Apply, optimizer: GradientTransformation, popart: PopArt, *, head: str = "output_linear"
) -> Learner:
    """Normalized SGD (Algorithm 2): raw targets, and gradients below the head scaled by σ⁻², output by output.

    With plain `optim.sgd` and the same first parameters it makes the predictions of `popart_learner`, step by step
    (Proposition 3). The outputs of ``apply`` are unnormalized here.

    Args:
        apply: ``apply(params, x)`` -> unnormalized outputs.
        optimizer: such as `optim.sgd(0.01)`.
        popart: the statistics, see `pop_art.popart`; POP is not used.
        head: the name of the last linear layer in the parameters.
    """
    checked_apply = _with_checked_head("normalized_sgd_learner", apply, head)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("normalized_sgd_learner", batch)
        statistics = _move_statistics(popart, state.statistics, example)
        lower, upper = split(state.params, head)

        def predict(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> Tensor:
            return checked_apply(unify(SplitParams(lower, upper)), example.x)

        outputs, pull_back = vjp(predict, lower, upper)  # type: ignore[misc]  # three results only with has_aux
        prediction = _select(outputs, example)
        delta = prediction - example.y

        # The head gets δ, the layers below get σ⁻² δ: scaled output by output, before it passes the head's weights.
        scaled_delta = _rescale(statistics, _rescale(statistics, delta, example), example)
        lower_grads, _ = pull_back(_lift(scaled_delta, outputs, example))
        _, upper_grads = pull_back(_lift(delta, outputs, example))

        tasks = _tasks(statistics, example)
        normalized_prediction = normalize(statistics, prediction, tasks)
        normalized_target = normalize(statistics, example.y, tasks)
        info = Info(
            loss=_half_square(normalized_prediction - normalized_target, outputs),
            prediction=prediction,
            target=example.y,
            error=delta.abs(),
            normalized_prediction=normalized_prediction,
            normalized_target=normalized_target,
        )
        grads = unify(SplitParams(lower_grads, upper_grads))
        return _apply_gradients(optimizer, state._replace(statistics=statistics), grads), info

    return Learner(_init_with("normalized_sgd_learner", popart, optimizer, head), update)


class _Example(NamedTuple):
    caller: str
    x: Any
    y: Tensor
    indices: Tensor | None


def _unpack(caller: str, batch: Batch) -> _Example:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"{caller}: `batch` must be (x, y) or (x, y, indices), got {got}.")
    x, y = batch[:2]
    indices = batch[2] if len(batch) == 3 else None
    if not isinstance(y, Tensor):
        raise TypeError(f"{caller}: the targets y of `batch` must be a tensor, got {type(y).__name__}.")
    if indices is not None and not isinstance(indices, Tensor):
        raise TypeError(f"{caller}: the indices of `batch` must be a tensor, got {type(indices).__name__}.")
    return _Example(caller, x, y, indices)


def _with_checked_head(caller: str, apply: Apply, head: str) -> Apply:
    """``apply`` with a check that the head has as many outputs as ``apply`` returns."""

    def checked(params: Params, x: Any) -> Tensor:
        outputs = apply(params, x)
        sizes = {value.shape[-2] for name, value in split(params, head).upper.items() if name.endswith("weight")}
        if outputs.ndim and sizes != {outputs.shape[-1]}:
            raise ValueError(
                f"{caller}: `head` must name the last layer, whose outputs `apply` returns: {head!r} has "
                f"{' and '.join(map(str, sorted(sizes)))} outputs, and `apply` returned {tuple(outputs.shape)}."
            )
        return outputs

    return checked


def _init_with(
    caller: str, popart: PopArt, optimizer: GradientTransformation, head: str | None = None
) -> Callable[[Params], LearnerState]:
    def init(params: Params) -> LearnerState:
        check_params(caller, params)
        if head is not None:
            check_head_name(caller, params, head)
        return LearnerState(dict(params), popart.init(params), optimizer.init(dict(params)))

    return init


def _tasks(statistics: PopArtState, example: _Example) -> Tensor | None:
    """The statistic of each target, by its index. None where all outputs share one statistic."""
    return None if statistics.shift.shape[-1] == 1 else example.indices


def _move_statistics(popart: PopArt, statistics: PopArtState, example: _Example) -> PopArtState:
    return popart.art(statistics, example.y, _tasks(statistics, example))


def _descend(
    apply: Apply, optimizer: GradientTransformation, state: LearnerState, example: _Example
) -> tuple[LearnerState, Info]:
    """A gradient step on the half squared error of the normalized outputs."""
    tasks = _tasks(state.statistics, example)
    normalized_target = normalize(state.statistics, example.y, tasks)

    def loss(params: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs = apply(params, example.x)
        normalized_prediction = _select(outputs, example)
        value = _half_square(normalized_prediction - normalized_target, outputs)
        return value, (value, normalized_prediction)

    grads, (value, normalized_prediction) = grad(loss, has_aux=True)(state.params)
    info = Info(
        loss=value,
        prediction=unnormalize(state.statistics, normalized_prediction, tasks),
        target=example.y,
        error=_rescale(state.statistics, normalized_prediction - normalized_target, example, inverse=True).abs(),
        normalized_prediction=normalized_prediction,
        normalized_target=normalized_target,
    )
    return _apply_gradients(optimizer, state, grads), info


def _apply_gradients(optimizer: GradientTransformation, state: LearnerState, grads: Params) -> LearnerState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return LearnerState(apply_updates(state.params, updates), state.statistics, opt_state)


def _half_square(delta: Tensor, outputs: Tensor) -> Tensor:
    """½ δ², summed over outputs, averaged over the batch."""
    return 0.5 * delta.square().sum() / outputs.shape[:-1].numel()


def _select(outputs: Tensor, example: _Example) -> Tensor:
    """The outputs that have a target, in the shape of the targets."""
    y, indices = example.y, example.indices
    if outputs.ndim == 0:
        raise ValueError(f"{example.caller}: `apply` must return outputs of shape [..., outputs], got a 0-d tensor.")
    if indices is not None:
        if not indices.shape == y.shape == outputs.shape[:-1]:
            raise ValueError(
                f"{example.caller}: with indices, targets and indices must have the shape of the outputs without their "
                f"last axis, {tuple(outputs.shape[:-1])}, got {tuple(y.shape)} and {tuple(indices.shape)}."
            )
        return outputs.gather(-1, indices.long()[..., None]).squeeze(-1)
    if y.shape == outputs.shape:
        return outputs
    if outputs.shape[-1] == 1 and y.shape == outputs.shape[:-1]:
        return outputs.squeeze(-1)
    raise ValueError(
        f"{example.caller}: the targets must have the shape of the outputs, {tuple(outputs.shape)}, "
        f"got {tuple(y.shape)}."
    )


def _lift(cotangent: Tensor, outputs: Tensor, example: _Example) -> Tensor:
    """The transpose of `_select`, averaged over the batch: a cotangent of the targets becomes one of all outputs."""
    cotangent = (cotangent / outputs.shape[:-1].numel()).to(outputs.dtype)
    if example.indices is None:
        return cotangent.reshape(outputs.shape)
    return torch.zeros_like(outputs).scatter(-1, example.indices.long()[..., None], cotangent[..., None])


def _rescale(statistics: PopArtState, delta: Tensor, example: _Example, *, inverse: bool = False) -> Tensor:
    """``δ / σ``, or the inverse ``σ δ``: changes the units of a difference, to which the shift does not apply."""
    zero = torch.zeros_like(statistics.shift)
    centred = statistics._replace(shift=zero, residue=zero)
    return (unnormalize if inverse else normalize)(centred, delta, _tasks(statistics, example))
