"""Regression problems drawn at random: a network, its data and its rates, trained by the library and by hand.

`draw_problem` draws a `Problem`. `train` trains it with one of the library's learners, `train_by_hand` with
`by_hand`'s mathematics. Both return the values that the checks compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from popart_func import learners, models, optim, pop_art, random
from popart_func.learners import Batch, Learner, LearnerState
from popart_func.optim import GradientTransformation
from popart_func.pop_art import PopArt, PopArtState
from popart_func.tree import PyTree
from popart_func.verify import by_hand, draw
from popart_func.verify.by_hand import Gradients, Layers, MeanVariance
from popart_func.verify.check import Settings
from popart_func.verify.noise import Noise

__all__ = [
    "HEAD",
    "STEPS",
    "MakeLearner",
    "MaskedBatch",
    "Problem",
    "StatisticsKind",
    "compared_values",
    "draw_problem",
    "drawn_statistics",
    "learner_maker",
    "masked_batch",
    "running_statistics",
    "sgd_of",
    "start_by_hand",
    "train",
    "train_by_hand",
]

STEPS = 5
HEAD = "output_linear"

StatisticsKind = Literal["running", "drawn", "fixed"]
"""Where statistics come from: the targets, a random draw (`Problem.shifts` and ``scales``), or shift 0 and scale 1."""


class Problem(NamedTuple):
    """A network, its data for some steps, and the rates of its training.

    Attributes:
        params: the network's parameters. The head predicts numbers of the targets' magnitude if the problem was drawn
            with ``popped``, else of order 1.
        x: inputs, ``[steps, (batch,) inputs]``.
        y: targets, ``[steps, (batch,) outputs]``, or ``[steps, batch]`` in an indexed architecture.
        indices: the output of each target, ``[steps, batch]``; used in an indexed architecture only.
        magnitude: the magnitude of each task's targets, ``[tasks]``.
        learning_rate: small enough not to saturate the hidden layers.
        step_size: the step size of the statistics.
        momentum: the decay of an optimizer with momentum.
        shifts: drawn shifts, which do not depend on the targets, ``[steps, tasks]``.
        scales: drawn scales, ``[steps, tasks]``.
    """

    params: dict[str, Tensor]
    x: Tensor
    y: Tensor
    indices: Tensor
    magnitude: Tensor
    learning_rate: Tensor
    step_size: Tensor
    momentum: Tensor
    shifts: Tensor
    scales: Tensor

    def batch(self, time: int, settings: Settings) -> Batch:
        """The batch of one step, as a learner takes it."""
        indices = (self.indices[time],) if settings.architecture.indexed else ()
        return (self.x[time], self.y[time], *indices)


def draw_problem(key: Tensor, settings: Settings, steps: int = STEPS, *, popped: bool = True) -> Problem:
    """Draws a problem. Each task has targets of its own magnitude.

    Args:
        key: the random key.
        settings: dtype and shapes.
        steps: the number of batches.
        popped: whether POP will adapt the head to the statistics. If not, the head's initial outputs are read as
            normalized ones, and training diverges unless they are of order 1.
    """
    architecture, dtype = settings.architecture, settings.dtype
    outputs, tasks = architecture.outputs, architecture.tasks
    first, second = random.split(key).unbind()
    numbers = draw.uniforms(
        second,
        dtype,
        x=(steps, *architecture.batched(architecture.inputs)),
        y=(steps, *architecture.batched(outputs)),
        indices=(steps, *architecture.batched()),
        rates=(3,),
        magnitude=(tasks,),
        offset=(tasks,),
        shifts=(steps, tasks),
        scales=(steps, tasks),
    )
    magnitude = draw.magnitude(numbers["magnitude"])
    offset = 3 * draw.heavy_tailed(numbers["offset"])
    y = magnitude * (offset + draw.normal(numbers["y"]))
    indices = (numbers["indices"] * outputs).long().clamp(max=outputs - 1)
    if architecture.indexed:
        y = y.gather(-1, indices[..., None]).squeeze(-1)
    params = draw.network(first, dtype, architecture)
    if popped:
        params[f"{HEAD}.weight"] = params[f"{HEAD}.weight"] * magnitude[:, None]
        params[f"{HEAD}.bias"] = params[f"{HEAD}.bias"] * magnitude
    x = draw.normal(numbers["x"]) + 0.2
    a, b, c = numbers["rates"].unbind()
    # A normalized error is at most √(1/β) = 10 (Proposition 2), or with drawn statistics about the drawn offset.
    error = 10 + offset.abs().amax()
    return Problem(
        params,
        x,
        y,
        indices,
        magnitude,
        learning_rate=draw.log_between(0.01, 0.2, a) / (error * (1 + x.square().sum(-1).amax())),
        step_size=draw.log_between(0.01, 0.5, b),
        momentum=draw.between(0.5, 0.9, c),
        shifts=magnitude * (offset + 2 * draw.normal(numbers["shifts"])),
        scales=magnitude * draw.log_between(0.3, 5, numbers["scales"]),
    )


def drawn_statistics(problem: Problem, time: int, settings: Settings) -> PopArt:
    """A Pop-Art whose statistics are the problem's drawn ones, whatever the targets."""
    shift, scale = problem.shifts[time], problem.scales[time]

    def init(params: models.Params | None = None) -> PopArtState:
        return pop_art.init_state(settings.architecture.tasks, dtype=shift.dtype, device=shift.device)

    def art(state: PopArtState, targets: Tensor, indices: Tensor | None = None) -> PopArtState:
        return draw.statistics(shift, scale, torch.zeros_like(shift))

    return PopArt(init, art)


MakeLearner = Callable[[Problem, int, Settings], Learner]
"""Makes the learner that takes one step of a problem; it may depend on the step's number."""


def running_statistics(problem: Problem, time: int, settings: Settings) -> PopArt:
    """A Pop-Art with the problem's step size, whose statistics are those of the targets."""
    return pop_art.popart(settings.architecture.tasks, problem.step_size, **draw.BOUNDS)


def sgd_of(problem: Problem) -> GradientTransformation:
    """Plain SGD at the problem's learning rate."""
    return optim.sgd(problem.learning_rate)


def learner_maker(
    name: str,
    optimizer: Callable[[Problem], GradientTransformation] = sgd_of,
    statistics: Callable[[Problem, int, Settings], PopArt] = running_statistics,
    **options: object,
) -> MakeLearner:
    """Makes learners of one kind for any problem.

    Args:
        name: the name of a function of `popart_func.learners`. It is looked up when a learner is made, so that a test
            can put a broken function in its place.
        optimizer: makes the optimizer.
        statistics: makes the Pop-Art.
        **options: further arguments of the learner.
    """

    def make(problem: Problem, time: int, settings: Settings) -> Learner:
        build: Callable[..., Learner] = getattr(learners, name)
        apply = models.stateless(draw.modules(settings.architecture).unified)
        return build(apply, optimizer(problem), statistics(problem, time, settings), **options)

    return make


def train(problem: Problem, settings: Settings, make: MakeLearner) -> tuple[LearnerState, dict[str, PyTree]]:
    """Trains with the library: the last state, and the values that `train_by_hand` returns as well."""
    state = make(problem, 0, settings).init(problem.params)
    predictions = []
    for time in range(problem.x.shape[0]):
        state, info = make(problem, time, settings).update(state, problem.batch(time, settings))
        predictions.append(info.prediction)
    return state, compared_values(problem, state.params, torch.stack(predictions), settings)


def compared_values(
    problem: Problem, params: dict[str, Tensor], predictions: Tensor, settings: Settings
) -> dict[str, PyTree]:
    """The values of a training that checks compare: the last parameters, and each step's predictions.

    Predictions ``[steps, ...]`` are divided by their task's magnitude, so that rounding of a task with large targets
    does not hide errors of a task with small ones.
    """
    magnitude = problem.magnitude.double()
    if settings.architecture.indexed:
        magnitude = magnitude.expand(settings.architecture.outputs)[problem.indices]
    return {"params": params, "predictions": predictions.double() / magnitude}


class MaskedBatch(NamedTuple):
    """A batch in one form for all architectures, in float64.

    Attributes:
        x: ``[batch, inputs]``.
        y: a target for each output, ``[batch, outputs]``; 0 where there is none.
        mask: 1 where there is a target, else 0, ``[batch, outputs]``.
    """

    x: Tensor
    y: Tensor
    mask: Tensor


def masked_batch(problem: Problem, time: int, settings: Settings) -> MaskedBatch:
    """The batch of one step as a `MaskedBatch`."""
    architecture = settings.architecture
    x, y = problem.x[time].double(), problem.y[time].double()
    if architecture.indexed:
        outputs = torch.arange(architecture.outputs, device=y.device)
        mask = (problem.indices[time][:, None] == outputs).double()
        return MaskedBatch(x, y[:, None] * mask, mask)
    y = y.reshape(-1, architecture.outputs)
    return MaskedBatch(x.reshape(y.shape[0], -1), y, torch.ones_like(y))


def start_by_hand(problem: Problem, settings: Settings) -> tuple[Layers, MeanVariance]:
    """The network, and statistics with mean 0 and variance 1, from which training by hand starts."""
    ones = torch.ones(settings.architecture.tasks, dtype=torch.float64, device=problem.x.device)
    return by_hand.layers_of(problem.params), MeanVariance(torch.zeros_like(ones), ones)


def train_by_hand(
    problem: Problem,
    settings: Settings,
    noise: Noise,
    *,
    popped: bool,
    normalized: bool,
    statistics: StatisticsKind = "running",
    momentum: bool = False,
) -> dict[str, PyTree]:
    """Trains by hand: Algorithm 1 (popped, normalized), ART without POP (normalized), or Algorithm 2 (neither).

    ART without POP and with fixed statistics is plain SGD.

    Args:
        problem: data and rates.
        settings: the shapes.
        noise: the noise of the arithmetic.
        popped: whether POP adapts the head to new statistics.
        normalized: whether the loss is in normalized units. If not, Σ⁻² scales the gradient of the lower layers.
        statistics: where the statistics come from.
        momentum: whether steps follow the decaying sum of gradients.

    Returns:
        The values that `train` returns as well.
    """
    layers, state = start_by_hand(problem, settings)
    velocity: Gradients | None = None
    predictions = []
    for time in range(problem.x.shape[0]):
        batch = masked_batch(problem, time, settings)
        new = state
        if statistics == "drawn":
            new = MeanVariance(problem.shifts[time].double(), problem.scales[time].double().square())
        elif statistics == "running":
            new = by_hand.art(state, batch.y, batch.mask, problem.step_size.double(), noise)
        if popped:
            layers = [*layers[:-1], by_hand.pop(layers[-1], state, new, noise)]
        state = new
        # Algorithm 1 adds each shift to the bias. The rounding of the shift stays in the bias.
        unit = state.scale if normalized else torch.ones_like(state.scale)
        weight, bias = layers[-1]
        layers = [*layers[:-1], (weight, bias + (noise(state.mean) - state.mean) / unit)]

        hidden, outputs = by_hand.forward(layers, batch.x, noise)
        target = noise(noise(batch.y - state.mean) / state.scale) if normalized else noise(batch.y)
        prediction = noise(outputs * state.scale) + noise(state.mean) if normalized else outputs
        cotangent = noise(outputs - target) * batch.mask / batch.x.shape[0]
        below = cotangent if normalized else noise(noise(cotangent / state.scale) / state.scale)
        gradients = by_hand.backward(layers, hidden, below, noise)[:-1]
        gradients += by_hand.backward(layers[-1:], hidden[-1:], cotangent, noise)
        if momentum:
            gradients = velocity = _accumulate(velocity, gradients, problem.momentum.double(), noise)
        layers = by_hand.sgd_step(layers, gradients, problem.learning_rate.double(), noise)
        if settings.architecture.indexed:
            predictions.append((prediction * batch.mask).sum(-1))
        else:
            predictions.append(prediction.reshape(problem.y.shape[1:]))
    return compared_values(problem, by_hand.named(problem.params, layers), torch.stack(predictions), settings)


def _accumulate(velocity: Gradients | None, gradients: Gradients, decay: Tensor, noise: Noise) -> Gradients:
    """The decaying sum of gradients."""
    if velocity is None:
        return gradients
    return [
        (noise(decay * old_weight) + weight, noise(decay * old_bias) + bias)
        for (old_weight, old_bias), (weight, bias) in zip(velocity, gradients, strict=True)
    ]
