"""Learners: one step of regression on targets of any magnitude, by SGD, ART, Pop-Art or normalized SGD.

State: LearnerState(params, statistics, opt_state)
init:   learner.init(params) -> LearnerState
update: learner.update(state, batch) -> (LearnerState, Info)

`sgd_learner` regresses on the raw targets, `art_learner` on normalized ones. `popart_learner` also preserves its
outputs (Algorithm 1). `normalized_sgd_learner` makes the same predictions by scaling a gradient instead of the head
(Algorithm 2). All are pure and written for one lane; `torch.vmap` over states, batches and hyper-parameters runs
thousands.

``apply(params, x)`` gives the outputs of the network: ``[outputs]`` for one example, ``[batch, outputs]`` for a batch.
A batch is ``(x, y)`` or ``(x, y, indices)``; y is float32, or float64 where the parameters are. Without indices, y has
a target for every output; with a single output, y may lack the last axis. With indices, each example has one target,
for the output that ``indices`` names.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithms 1 and 2, Proposition 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp

from popart_func import optim
from popart_func._checks import check_in_range
from popart_func._networks import Apply, Network, as_network
from popart_func._preservation import check_not_tied, check_preservation
from popart_func._typing import Float, Num
from popart_func.models import Params, SplitParams, split, unify
from popart_func.optim import GradientTransformation, apply_updates
from popart_func.pop_art import PopArt, PopArtState, normalize, popart, unnormalize

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

Batch = tuple[Any, ...]
"""``(x, y)`` or ``(x, y, indices)``."""


class LearnerState(NamedTuple):
    """What the next step needs. All learners have the same; with SGD the statistics stay at 0 and 1.

    Attributes:
        params: the flat parameters of the network, and its buffers.
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
    network = as_network("sgd_learner", apply)
    _check_parts("sgd_learner", optimizer)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        return _descend(network, optimizer, state, _unpack("sgd_learner", batch, state.statistics))

    return Learner(_init_with(network, optimizer, popart(1, step_size=1).init), update)


def art_learner(apply: Apply, optimizer: GradientTransformation, popart: PopArt) -> Learner:
    """ART alone: regression on normalized targets, without POP, so that new statistics move every prediction.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs.
        optimizer: such as `optim.sgd(0.01)`.
        popart: the statistics, see `pop_art.popart`.
    """
    network = as_network("art_learner", apply)
    _check_parts("art_learner", optimizer, popart)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("art_learner", batch, state.statistics)
        statistics = _move_statistics(popart, state.statistics, example)
        return _descend(network, optimizer, state._replace(statistics=statistics), example)

    return Learner(_init_with(network, optimizer, popart.init), update)


def popart_learner(
    apply: Apply,
    optimizer: GradientTransformation,
    popart: PopArt,
    *,
    head: str = "output_linear",
    rescale_moments: bool | Literal["head", "all"] = True,
) -> Learner:
    """Pop-Art (Algorithm 1): normalized targets, and POP, so that new statistics move no prediction.

    At the first update of a network, also while an engine traces it or `torch.vmap` runs it, the network runs twice
    more, outside of the trace, to check that POP preserves its outputs: see ``Raises``. Values that can't be read there
    are replaced by random ones. Under `torch.compile` and in the capture of a CUDA graph nothing is checked: call the
    learner outside of it once. A warning says where a network can't be checked.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs: what the head returns, and nothing else.
        optimizer: such as `optim.adam(1e-3)`.
        popart: the statistics, see `pop_art.popart`.
        head: the name of the last linear layer in the parameters, such as ``"critic.head"``.
        rescale_moments: which of the optimizer's moments follow the statistics into the new units
            (`optim.rescale_moments`). ``"head"`` or True: those of the head, which makes momentum equal to that of
            Algorithm 2. ``"all"``: also those below the head, as if all earlier targets had been normalized by the new
            statistics; for one statistic only. False: none.

    Raises:
        ValueError: an unknown ``rescale_moments``, or ``"all"`` with several statistics. At the first update: POP does
            not preserve the outputs, since something is behind the head or beside it, or its weights are used twice.

    >>> from popart_func.models import UnifiedModel, init_params, stateless
    >>> from popart_func.pop_art import popart
    >>> learner = popart_learner(stateless(UnifiedModel(16, 10, 1)), optim.sgd(0.01), popart(1, step_size=0.1))
    >>> state = learner.init(init_params(lambda: UnifiedModel(16, 10, 1), seed=0))
    >>> state, info = learner.update(state, (torch.ones(16), torch.tensor([1000.0])))
    >>> state.statistics.shift
    tensor([100.])
    """
    network = as_network("popart_learner", apply, head)
    check_not_tied(network)
    _check_parts("popart_learner", optimizer, popart)
    if rescale_moments not in (True, False, "head", "all"):
        raise ValueError(f"popart_learner: `rescale_moments` must be a bool, 'head' or 'all', got {rescale_moments!r}.")

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("popart_learner", batch, state.statistics)
        lower, upper = split(state.params, head)
        tasks = _tasks(state.statistics, example)
        popped, statistics = popart.update(upper, state.statistics, example.y, tasks)
        opt_state = state.opt_state
        if rescale_moments:
            ratio = state.statistics.scale / statistics.scale
            factors = optim.gradient_factors(ratio, upper, network.trained(lower) if rescale_moments == "all" else ())
            opt_state = optim.rescale_moments(opt_state, factors)
        together = unify(SplitParams(lower, popped))
        params = {name: together[name] for name in state.params}
        result = _descend(network, optimizer, LearnerState(params, statistics, opt_state), example)
        if statistics is not state.statistics:  # a user's own may stand still
            check_preservation(network, params, example.x, statistics)
        return result

    return Learner(_init_with(network, optimizer, popart.init), update)


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
    network = as_network("normalized_sgd_learner", apply, head)
    _check_parts("normalized_sgd_learner", optimizer, popart)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = _unpack("normalized_sgd_learner", batch, state.statistics)
        statistics = _move_statistics(popart, state.statistics, example)
        lower, upper = split(state.params, head)

        def predict(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return network({**state.params, **lower, **upper}, example.x)

        outputs, pull_back, buffers = vjp(predict, network.trained(lower), upper, has_aux=True)  # type: ignore[misc]
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
        return _apply_gradients(optimizer, state._replace(statistics=statistics), grads, buffers), info

    return Learner(_init_with(network, optimizer, popart.init), update)


class _Example(NamedTuple):
    caller: str
    x: Any
    y: Tensor
    indices: Tensor | None


def _unpack(caller: str, batch: Batch, statistics: PopArtState) -> _Example:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"{caller}: `batch` must be (x, y) or (x, y, indices), got {got}.")
    x, y = batch[:2]
    indices = batch[2] if len(batch) == 3 else None
    if not isinstance(y, Tensor):
        raise TypeError(f"{caller}: the targets y of `batch` must be a tensor, got {type(y).__name__}.")
    dtype = statistics.shift.dtype
    if torch.promote_types(y.dtype, dtype) != dtype:
        raise TypeError(
            f"{caller}: the targets y of `batch` must be of the statistics' dtype, {dtype}, or convert to it, got "
            f"{y.dtype}: write y.float(), or make the parameters double."
        )
    if indices is not None and not isinstance(indices, Tensor):
        raise TypeError(f"{caller}: the indices of `batch` must be a tensor, got {type(indices).__name__}.")
    return _Example(caller, x, y, indices)


def _check_parts(caller: str, optimizer: Any, popart: Any = None) -> None:
    if not isinstance(optimizer, GradientTransformation):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        raise TypeError(
            f"{caller}: `optimizer` must be a popart_func.GradientTransformation, such as popart_func.adam(1e-3), got "
            f"{kind.__module__}.{kind.__name__}."
        )
    if popart is not None and not isinstance(popart, PopArt):
        raise TypeError(
            f"{caller}: `popart` must be the statistics, such as popart_func.popart(1, step_size=0.01), got "
            f"{type(popart).__name__}."
        )


def _init_with(
    network: Network, optimizer: GradientTransformation, init_statistics: Callable[[Params], PopArtState]
) -> Callable[[Params], LearnerState]:
    def init(params: Params) -> LearnerState:
        params = network.init(params)
        return LearnerState(params, init_statistics(params), optimizer.init(network.trained(params)))

    return init


def _tasks(statistics: PopArtState, example: _Example) -> Tensor | None:
    """The statistic of each target, by its index. None where all outputs share one statistic."""
    return None if statistics.shift.shape[-1] == 1 else example.indices


def _move_statistics(popart: PopArt, statistics: PopArtState, example: _Example) -> PopArtState:
    return popart.art(statistics, example.y, _tasks(statistics, example))


def _descend(
    network: Network, optimizer: GradientTransformation, state: LearnerState, example: _Example
) -> tuple[LearnerState, Info]:
    """A gradient step on the half squared error of the normalized outputs."""
    tasks = _tasks(state.statistics, example)
    normalized_target = normalize(state.statistics, example.y, tasks)

    def loss(trained: Params) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
        outputs, buffers = network({**state.params, **trained}, example.x)
        normalized_prediction = _select(outputs, example)
        value = _half_square(normalized_prediction - normalized_target, outputs)
        return value, (value, normalized_prediction, buffers)

    grads, (value, normalized_prediction, buffers) = grad(loss, has_aux=True)(network.trained(state.params))
    info = Info(
        loss=value,
        prediction=unnormalize(state.statistics, normalized_prediction, tasks),
        target=example.y,
        error=_rescale(state.statistics, normalized_prediction - normalized_target, example, inverse=True).abs(),
        normalized_prediction=normalized_prediction,
        normalized_target=normalized_target,
    )
    return _apply_gradients(optimizer, state, grads, buffers), info


def _apply_gradients(
    optimizer: GradientTransformation, state: LearnerState, grads: Params, buffers: Params
) -> LearnerState:
    trained = {name: state.params[name] for name in grads}
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = {**state.params, **buffers, **apply_updates(trained, updates)}
    return LearnerState(params, state.statistics, opt_state)


def _half_square(delta: Tensor, outputs: Tensor) -> Tensor:
    """½ δ², summed over outputs, averaged over the batch."""
    return 0.5 * delta.square().sum() / outputs.shape[:-1].numel()


def _select(outputs: Tensor, example: _Example) -> Tensor:
    """The outputs that have a target, in the shape of the targets."""
    y, indices = example.y, example.indices
    if indices is not None:
        if not indices.shape == y.shape == outputs.shape[:-1]:
            raise ValueError(
                f"{example.caller}: with indices, targets and indices must have the shape of the outputs without their "
                f"last axis, {tuple(outputs.shape[:-1])}, got {tuple(y.shape)} and {tuple(indices.shape)}."
            )
        check_in_range(example.caller, "indices", indices, outputs.shape[-1])
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
