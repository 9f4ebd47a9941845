"""Learners: one step of regression on targets of any magnitude, by SGD, ART, Pop-Art or normalized SGD.

State: LearnerState(params, statistics, opt_state)
init:   learner.init(params) -> LearnerState
update: learner.update(state, batch) -> (LearnerState, Info)

`sgd_learner` regresses on the raw targets, `art_learner` on normalized ones. `popart_learner` also preserves its
outputs (Algorithm 1). `normalized_sgd_learner` makes the same predictions by scaling a gradient instead of the head
(Algorithm 2). All are pure and written for one lane; `torch.vmap` over states, batches and hyper-parameters runs
thousands.

``apply(params, x)`` gives the outputs of the network: ``[outputs]`` for one example, ``[batch, outputs]`` for a batch.
`batches` says what a batch is. The loss is half the squared error, one of `losses`, or your own.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithms 1 and 2, Proposition 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from popart_func._checks import check_rescale_moments
from popart_func._gradients import gradient
from popart_func._networks import Apply, Network, as_network
from popart_func._preservation import check_not_tied, check_preservation
from popart_func.heads import HeadLike, locate_layers
from popart_func.learners.batches import Batch, Example, Info, Learner, LearnerState, unpack
from popart_func.learners.losses import ByOutput, Loss, check_loss, half_square
from popart_func.models import Params
from popart_func.optim import GradientTransformation, apply_updates
from popart_func.pop_art import PopArt, PopArtState, normalize, popart, unnormalize

__all__ = ["Apply", "art_learner", "normalized_sgd_learner", "popart_learner", "sgd_learner"]


def sgd_learner(apply: Apply, optimizer: GradientTransformation, *, loss: Loss | None = None) -> Learner:
    """Regression on the raw targets, the baseline for the other learners.

    Args:
        apply: ``apply(params, x)`` -> outputs.
        optimizer: such as `optim.sgd(0.01)`.
        loss: of the outputs and targets, as in `losses`; None for half the squared error.

    >>> from popart_func.optim import sgd
    >>> learner = sgd_learner(lambda params, x: x @ params["weight"].T, sgd(0.5))
    >>> state = learner.init({"weight": torch.zeros(1, 2)})
    >>> state, info = learner.update(state, (torch.tensor([1.0, 0.0]), torch.tensor([4.0])))
    >>> info.loss, state.params["weight"]
    (tensor(8.), tensor([[2., 0.]]))
    """
    network = as_network("sgd_learner", apply)
    _check_parts("sgd_learner", optimizer, loss)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = unpack("sgd_learner", batch, state.statistics, None)
        return _descend(network, optimizer, loss, state, example, _Moved(state.statistics, None))

    return Learner(_init_with(network, optimizer, popart(1, step_size=1).init), update)


def art_learner(
    apply: Apply, optimizer: GradientTransformation, popart: PopArt, *, loss: Loss | None = None
) -> Learner:
    """ART alone: regression on normalized targets, without POP, so that new statistics move every prediction.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs.
        optimizer: such as `optim.sgd(0.01)`.
        popart: the statistics, see `pop_art.popart` and `scales`.
        loss: of normalized outputs and targets, as in `losses`; None for half the squared error.
    """
    network = as_network("art_learner", apply)
    _check_parts("art_learner", optimizer, loss, popart)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = unpack("art_learner", batch, state.statistics, popart)
        statistics = popart.moved(state.statistics, example.y, example.tasks, example.weights)
        moved = _Moved(state.statistics, popart)
        return _descend(network, optimizer, loss, state._replace(statistics=statistics), example, moved)

    return Learner(_init_with(network, optimizer, popart.init), update)


def popart_learner(
    apply: Apply,
    optimizer: GradientTransformation,
    popart: PopArt,
    *,
    head: HeadLike = "output_linear",
    rescale_moments: bool | Literal["head", "all"] = True,
    loss: Loss | None = None,
) -> Learner:
    """Pop-Art (Algorithm 1): normalized targets, and POP, so that new statistics move no prediction.

    At the first update of a network, also while an engine traces it or `torch.vmap` runs it, the network runs twice
    more, outside of the trace, to check that POP preserves its outputs: see ``Raises``. Values that can't be read there
    are replaced by random ones. Under `torch.compile` and in the capture of a CUDA graph nothing is checked: call the
    learner outside of it once. A warning says where a network can't be checked.

    Args:
        apply: ``apply(params, x)`` -> normalized outputs: what the head returns, and nothing else.
        optimizer: such as `optim.adam(1e-3)`.
        popart: the statistics, see `pop_art.popart` and `scales`.
        head: the name of the last linear layer in the parameters, such as ``"critic.head"``; a `heads.Head` for another
            layout; or a list of them, see `heads`.
        rescale_moments: which of the optimizer's moments follow the statistics into the new units
            (`optim.rescale_moments`). ``"head"`` or True: those of the head, which makes momentum equal to that of
            Algorithm 2. ``"all"``: also those below the head, as if all earlier targets had been normalized by the new
            statistics; for one statistic only. False: none.
        loss: of normalized outputs and targets, as in `losses`; None for half the squared error.

    Raises:
        TypeError: at the first update, an optimizer whose state is not known (`optim.register_state`).
        ValueError: an unknown ``rescale_moments``, or ``"all"`` with several statistics. At the first update: POP does
            not preserve the outputs, since something is behind the head or beside it, or its weights are used twice.

    >>> from popart_func.models import UnifiedModel, init_params, stateless
    >>> from popart_func.optim import sgd
    >>> from popart_func.pop_art import popart
    >>> learner = popart_learner(stateless(UnifiedModel(16, 10, 1)), sgd(0.01), popart(1, step_size=0.1))
    >>> state = learner.init(init_params(lambda: UnifiedModel(16, 10, 1), seed=0))
    >>> state, info = learner.update(state, (torch.ones(16), torch.tensor([1000.0])))
    >>> state.statistics.shift
    tensor([100.])
    """
    network = as_network("popart_learner", apply, head)
    check_not_tied(network)
    _check_parts("popart_learner", optimizer, loss, popart)
    check_rescale_moments("popart_learner", rescale_moments)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = unpack("popart_learner", batch, state.statistics, popart)
        params, opt_state, statistics = popart.update_network(
            state.params,
            state.opt_state,
            state.statistics,
            example.y,
            example.tasks,
            example.weights,
            head=head,
            rescale_moments=rescale_moments,
        )
        popped, moved = LearnerState(params, statistics, opt_state), _Moved(state.statistics, popart)
        result = _descend(network, optimizer, loss, popped, example, moved)
        if statistics is not state.statistics:  # a user's own may stand still
            check_preservation(network, params, example.x, statistics, popart.groups)
        return result

    return Learner(_init_with(network, optimizer, popart.init), update)


def normalized_sgd_learner(
    apply: Apply, optimizer: GradientTransformation, popart: PopArt, *, head: HeadLike = "output_linear"
) -> Learner:
    """Normalized SGD (Algorithm 2): raw targets, and gradients below the head scaled by σ⁻², output by output.

    With plain `optim.sgd` and the same first parameters it makes the predictions of `popart_learner`, step by step
    (Proposition 3). The outputs of ``apply`` are unnormalized here.

    Args:
        apply: ``apply(params, x)`` -> unnormalized outputs.
        optimizer: such as `optim.sgd(0.01)`.
        popart: the statistics, see `pop_art.popart`; POP is not used.
        head: the name of the last linear layer in the parameters, or a list of them, see `heads`.
    """
    network = as_network("normalized_sgd_learner", apply, head)
    _check_parts("normalized_sgd_learner", optimizer, None, popart)

    def update(state: LearnerState, batch: Batch) -> tuple[LearnerState, Info]:
        example = unpack("normalized_sgd_learner", batch, state.statistics, popart)
        statistics = popart.moved(state.statistics, example.y, example.tasks, example.weights)
        example = example.at_outputs()
        layers = locate_layers("normalized_sgd_learner", state.params, network.heads)
        heads = {name for layer in layers for name in (layer.weight, layer.bias) if name is not None}
        upper = {name: leaf for name, leaf in state.params.items() if name in heads}
        lower = {name: leaf for name, leaf in network.trained(state.params).items() if name not in heads}

        def predict(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return network({**state.params, **lower, **upper}, example.x)

        outputs, pull_back, buffers = vjp(predict, lower, upper, has_aux=True)  # type: ignore[misc]
        prediction = example.select(outputs)
        delta = example.present(prediction - example.y)

        # The head gets δ, the layers below get σ⁻² δ: scaled output by output, before it passes the head's weights.
        scaled_delta = example.rescale(statistics, example.rescale(statistics, delta))
        lower_grads, _ = pull_back(example.lift(scaled_delta, outputs))
        _, upper_grads = pull_back(example.lift(delta, outputs))

        normalized_prediction = normalize(statistics, prediction, example.tasks)
        normalized_target = example.present(normalize(statistics, example.y, example.tasks))
        value = _mean_loss(None, normalized_prediction, normalized_target, outputs, statistics, example)
        result = _apply_gradients(
            optimizer, state._replace(statistics=statistics), {**lower_grads, **upper_grads}, buffers
        )
        return result, Info(
            value,
            prediction,
            example.y,
            delta.abs(),
            normalized_prediction,
            normalized_target,
            *_about_statistics(_Moved(state.statistics, popart), statistics, normalized_target, example),
        )

    return Learner(_init_with(network, optimizer, popart.init), update)


class _Moved(NamedTuple):
    """The statistics before an update, and what moved them."""

    before: PopArtState
    popart: PopArt | None


def _check_parts(caller: str, optimizer: Any, loss: Any, popart: Any = None) -> None:
    if not isinstance(optimizer, GradientTransformation):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        raise TypeError(
            f"{caller}: `optimizer` must be a popart_func.GradientTransformation, such as popart_func.adam(1e-3), got "
            f"{kind.__module__}.{kind.__name__}."
        )
    if loss is not None:
        check_loss(caller, loss)
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


def _descend(
    network: Network,
    optimizer: GradientTransformation,
    loss: Loss | None,
    state: LearnerState,
    example: Example,
    moved: _Moved,
) -> tuple[LearnerState, Info]:
    """A gradient step on the loss of the normalized outputs."""
    example = example.at_outputs()
    statistics = state.statistics
    normalized_target = example.present(normalize(statistics, example.y, example.tasks))

    def objective(trained: Params) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
        outputs, buffers = network({**state.params, **trained}, example.x)
        normalized_prediction = example.select(outputs)
        value = _mean_loss(loss, normalized_prediction, normalized_target, outputs, statistics, example)
        return value, (value, normalized_prediction, buffers)

    inputs = example.x, example.y, example.weights, state.params, statistics
    trained = network.trained(state.params)
    grads, (value, normalized_prediction, buffers) = gradient(objective, trained, inputs)
    delta = example.present(normalized_prediction - normalized_target)
    info = Info(
        value,
        unnormalize(statistics, normalized_prediction, example.tasks),
        example.y,
        example.rescale(statistics, delta, inverse=True).abs(),
        normalized_prediction,
        normalized_target,
        *_about_statistics(moved, statistics, normalized_target, example),
    )
    return _apply_gradients(optimizer, state, grads, buffers), info


def _about_statistics(
    moved: _Moved, statistics: PopArtState, normalized_target: Tensor, example: Example
) -> tuple[Tensor, Tensor, Tensor]:
    """Info's scale ratio, use of Proposition 2's bound, and counts."""
    ratio = moved.before.scale / statistics.scale
    bound = None if moved.popart is None else moved.popart.bound
    if bound is None or statistics is moved.before:
        return ratio, torch.zeros_like(normalized_target), statistics.count
    share, samples, count = example.shares(statistics)
    most = bound(count, share, samples, normalized_target.dtype)
    use = torch.where(most > 0, normalized_target.abs() / most, 0)
    return ratio, use, statistics.count


def _apply_gradients(
    optimizer: GradientTransformation, state: LearnerState, grads: Params, buffers: Params
) -> LearnerState:
    trained = {name: state.params[name] for name in grads}
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = {**state.params, **buffers, **apply_updates(trained, updates)}
    return LearnerState(params, state.statistics, opt_state)


def _mean_loss(
    loss: Loss | None,
    prediction: Tensor,
    target: Tensor,
    outputs: Tensor,
    statistics: PopArtState,
    example: Example,
) -> Tensor:
    """The loss, summed over outputs, averaged over the batch; 0-d."""
    if loss is None and example.weights is None:
        return _half_square(prediction - target, outputs)
    if isinstance(loss, ByOutput):
        loss = loss.at(outputs.shape[-1], example.indices)
    losses = (loss or half_square)(example.present(prediction), target, statistics, example.tasks, **example.others)
    if not isinstance(losses, Tensor) or losses.shape != target.shape:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{example.caller}: `loss` must return the loss of each target, of shape {tuple(target.shape)}, got {got}. "
            f"The learner averages them, with the weights of the batch."
        )
    return example.average(example.present(losses), outputs).sum()


def _half_square(delta: Tensor, outputs: Tensor) -> Tensor:
    """½ δ², summed over outputs, averaged over the batch."""
    return 0.5 * delta.square().sum() / outputs.shape[:-1].numel()
