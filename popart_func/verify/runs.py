"""A network, its data and its rates, drawn for one seed; trained by the library's learners, and by hand."""

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
from popart_func.verify.by_hand import Gradients, Noise, Statistics
from popart_func.verify.check import Settings

__all__ = [
    "HEAD",
    "STEPS",
    "Make",
    "Run",
    "by_hand_run",
    "data_of",
    "draw_run",
    "drawn_statistics",
    "learner_of",
    "result",
    "sgd_of",
    "train",
]

STEPS = 5
HEAD = "output_linear"


class Run(NamedTuple):
    """A network, its data ``[steps, ...]``, and what it is trained with.

    Attributes:
        params: the head predicts numbers of the targets' magnitude if it is ``popped``, else of order 1.
        x: ``[steps, (batch,) inputs]``.
        y: ``[steps, (batch,) outputs]``, or with indices ``[steps, batch]``.
        indices: the output of each target ``[steps, batch]``; read only where the architecture has indices.
        magnitude: of each task's targets, ``[tasks]``.
        learning_rate: small enough not to saturate the hidden layers.
        step_size: of the statistics.
        momentum: of an optimizer that has it.
        shifts: ``[steps, tasks]``: statistics that come from nowhere,
        scales: and are as far apart.
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
        """What a learner takes at a time."""
        indices = (self.indices[time],) if settings.architecture.indexed else ()
        return (self.x[time], self.y[time], *indices)


def draw_run(key: Tensor, settings: Settings, steps: int = STEPS, *, popped: bool = True) -> Run:
    """Draws a run. Outputs with statistics of their own have their own magnitude.

    Without POP the head's first predictions are in units of statistics yet to come: far from 1, training diverges.
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
    # An error is at most √(1/β) = 10 scales (Proposition 2), or what the drawn scales make of the drawn offsets.
    error = 10 + offset.abs().amax()
    return Run(
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


def drawn_statistics(run: Run, time: int, settings: Settings) -> PopArt:
    """Statistics that are what was drawn, whatever the targets: POP, without ART."""
    shift, scale = run.shifts[time], run.scales[time]

    def init(params: models.Params | None = None) -> PopArtState:
        return pop_art.init_state(settings.architecture.tasks, dtype=shift.dtype, device=shift.device)

    def art(state: PopArtState, targets: Tensor, indices: Tensor | None = None) -> PopArtState:
        return draw.statistics(shift, scale, torch.zeros_like(shift))

    return PopArt(init, art)


Make = Callable[[Run, int, Settings], Learner]
"""The learner of a step."""


def popart_of(run: Run, time: int, settings: Settings) -> PopArt:
    """ART and POP with the drawn step size."""
    return pop_art.popart(settings.architecture.tasks, run.step_size, **draw.BOUNDS)


def sgd_of(run: Run) -> GradientTransformation:
    """Plain SGD at the drawn rate."""
    return optim.sgd(run.learning_rate)


def learner_of(
    name: str,
    optimizer: Callable[[Run], GradientTransformation] = sgd_of,
    statistics: Callable[[Run, int, Settings], PopArt] = popart_of,
    **options: object,
) -> Make:
    """One of `learners` by name, on a drawn run."""

    def make(run: Run, time: int, settings: Settings) -> Learner:
        build: Callable[..., Learner] = getattr(learners, name)
        apply = models.stateless(draw.modules(settings.architecture).unified)
        return build(apply, optimizer(run), statistics(run, time, settings), **options)

    return make


def train(run: Run, settings: Settings, make: Make) -> tuple[LearnerState, dict[str, PyTree]]:
    """The library's learner, step by step: its last state, and what `by_hand_run` returns."""
    state = make(run, 0, settings).init(run.params)
    predictions = []
    for time in range(run.x.shape[0]):
        state, info = make(run, time, settings).update(state, run.batch(time, settings))
        predictions.append(info.prediction)
    return state, result(run, state, torch.stack(predictions), settings)


def result(run: Run, state: LearnerState, predictions: Tensor, settings: Settings) -> dict[str, PyTree]:
    """What is compared of a run: the last parameters, and each step's predictions, ``[steps, ...]``, in units."""
    return {"params": state.params, "predictions": _in_units(predictions, run, settings)}


def _in_units(predictions: Tensor, run: Run, settings: Settings) -> Tensor:
    """Predictions over their task's magnitude, so that none hides behind a larger one's rounding."""
    magnitude = run.magnitude.double()
    if not settings.architecture.indexed:
        return predictions.double() / magnitude
    return predictions.double() / magnitude.expand(settings.architecture.outputs)[run.indices]


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    mask: Tensor


def data_of(run: Run, time: int, settings: Settings) -> Data:
    """A batch with its batch axis, a target for each output, and which of these there are."""
    architecture = settings.architecture
    x, y = run.x[time].double(), run.y[time].double()
    if architecture.indexed:
        outputs = torch.arange(architecture.outputs, device=y.device)
        mask = (run.indices[time][:, None] == outputs).double()
        return Data(x, y[:, None] * mask, mask)
    y = y.reshape(-1, architecture.outputs)
    return Data(x.reshape(y.shape[0], -1), y, torch.ones_like(y))


def by_hand_run(
    run: Run,
    settings: Settings,
    noise: Noise,
    *,
    popped: bool,
    normalized: bool,
    statistics: Literal["running", "drawn", "fixed"] = "running",
    momentum: bool = False,
) -> dict[str, PyTree]:
    """Algorithm 1 (popped, normalized), ART alone (normalized), or Algorithm 2 (neither), by hand.

    With fixed statistics ART alone is SGD.

    Args:
        run: data and rates.
        settings: the shapes.
        noise: of the arithmetic.
        popped: whether the head follows the statistics.
        normalized: whether the loss is in normalized units; else Σ⁻² scales what reaches the lower layers.
        statistics: those of the targets, the drawn ones, or 0 and 1.
        momentum: step along the decaying sum of gradients.
    """
    layers = by_hand.layers_of(run.params)
    ones = torch.ones(settings.architecture.tasks, dtype=torch.float64, device=run.x.device)
    state = Statistics(torch.zeros_like(ones), ones)
    velocity: Gradients | None = None
    predictions = []
    for time in range(run.x.shape[0]):
        data = data_of(run, time, settings)
        new = state
        if statistics == "drawn":
            new = Statistics(run.shifts[time].double(), run.scales[time].double().square())
        elif statistics == "running":
            new = by_hand.art(state, data.y, data.mask, run.step_size.double(), noise)
        if popped:
            layers = [*layers[:-1], by_hand.pop(layers[-1], state, new, noise)]
        state = new
        # Algorithm 1 puts each shift into the bias, and what rounding takes from it there stays.
        unit = state.scale if normalized else torch.ones_like(state.scale)
        weight, bias = layers[-1]
        layers = [*layers[:-1], (weight, bias + (noise(state.mean) - state.mean) / unit)]

        hidden, outputs = by_hand.forward(layers, data.x, noise)
        target = noise(noise(data.y - state.mean) / state.scale) if normalized else noise(data.y)
        prediction = noise(outputs * state.scale) + noise(state.mean) if normalized else outputs
        cotangent = noise(outputs - target) * data.mask / data.x.shape[0]
        below = cotangent if normalized else noise(noise(cotangent / state.scale) / state.scale)
        upper_gradient = by_hand.backward(layers, hidden, cotangent, noise)[-1:]
        gradients = by_hand.backward(layers, hidden, below, noise)[:-1] + upper_gradient
        if momentum:
            gradients = velocity = _accumulate(velocity, gradients, run.momentum.double(), noise)
        layers = by_hand.step(layers, gradients, run.learning_rate.double(), noise)
        predictions.append(_select(prediction, data, run, settings))
    in_units = _in_units(torch.stack(predictions), run, settings)
    return {"params": by_hand.named(run.params, layers), "predictions": in_units}


def _accumulate(velocity: Gradients | None, gradients: Gradients, decay: Tensor, noise: Noise) -> Gradients:
    if velocity is None:
        return gradients
    return [
        (noise(decay * old_weight) + weight, noise(decay * old_bias) + bias)
        for (old_weight, old_bias), (weight, bias) in zip(velocity, gradients, strict=True)
    ]


def _select(prediction: Tensor, data: Data, run: Run, settings: Settings) -> Tensor:
    """The predictions that have a target, in the shape of the targets."""
    if settings.architecture.indexed:
        return (prediction * data.mask).sum(-1)
    return prediction.reshape(run.y.shape[1:])
