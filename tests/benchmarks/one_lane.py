"""What a call of the library costs where there is one lane, beside the same by hand, in CPU time on one thread.

Both sides alternate in one process; a number is a median of 21 times. By hand there are no checks, no residue of the
mean, no bounds of inputs, and nothing but the loss, the prediction and its error for an info. For `learner.update`
there are two forms: pure functions (`torch.func`), and a module that `torch.optim.Adam` and Pop-Art change in place.
`scan of one step` is `learner.update` on the engine `native`, which is compiled beforehand.

    python tests/benchmarks/one_lane.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad

import popart_func as pf

BETA, RATE, BATCH = 0.01, 1e-3, 32
WEIGHT, BIAS = "output_linear.weight", "output_linear.bias"


def art_by_hand(mean: Tensor, variance: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the variance and the scale after a batch."""
    distance = y.mean(0) - mean
    spread = y.var(0, correction=0)
    mean = mean + BETA * distance
    variance = (1 - BETA) * variance + BETA * spread + BETA * (1 - BETA) * distance * distance
    return mean, variance, variance.sqrt().clamp(1e-4, 1e6)


def make() -> pf.UnifiedModel:
    return pf.UnifiedModel(16, 10, 1)


class InPlace:
    """A module, `torch.optim.Adam`, and Pop-Art that changes both in place."""

    def __init__(self) -> None:
        self.network = make()
        self.optimizer = torch.optim.Adam(self.network.parameters(), RATE)
        self.mean, self.variance, self.scale = torch.zeros(1), torch.ones(1), torch.ones(1)

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            mean, self.variance, scale = art_by_hand(self.mean, self.variance, y)
            head, ratio = self.network.output_linear, self.scale / scale
            head.weight.mul_(ratio)
            head.bias.mul_(self.scale).add_(self.mean - mean).div_(scale)
            for leaf in (head.weight, head.bias):
                if leaf in self.optimizer.state:
                    self.optimizer.state[leaf]["exp_avg"].mul_(ratio)
                    self.optimizer.state[leaf]["exp_avg_sq"].mul_(ratio * ratio)
            self.mean, self.scale = mean, scale
        prediction = self.network(x)
        loss = 0.5 * (prediction - (y - self.mean) / self.scale).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        prediction = prediction.detach() * self.scale + self.mean
        return loss.detach(), prediction, (prediction - y).abs()


class Pure:
    """The same as pure functions of a state."""

    def __init__(self) -> None:
        self.network = make()
        params = {name: leaf.detach() for name, leaf in self.network.named_parameters()}
        zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        self.state = params, (torch.zeros(1), torch.ones(1), torch.ones(1)), (torch.zeros(()), zeros, dict(zeros))

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        params, (mean, variance, scale), (count, first, second) = self.state
        new_mean, variance, new_scale = art_by_hand(mean, variance, y)
        ratio = scale / new_scale
        params = {**params, WEIGHT: params[WEIGHT] * ratio, BIAS: (params[BIAS] * scale + mean - new_mean) / new_scale}
        first = {**first, WEIGHT: first[WEIGHT] * ratio, BIAS: first[BIAS] * ratio}
        second = {**second, WEIGHT: second[WEIGHT] * ratio * ratio, BIAS: second[BIAS] * ratio * ratio}
        target = (y - new_mean) / new_scale

        def objective(params: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            prediction = functional_call(self.network, params, (x,))
            loss = 0.5 * (prediction - target).square().sum(-1).mean()
            return loss, (loss, prediction)

        grads, (loss, prediction) = grad(objective, has_aux=True)(params)
        count = count + 1
        first = {name: 0.9 * first[name] + 0.1 * grads[name] for name in grads}
        second = {name: 0.999 * second[name] + 0.001 * grads[name] * grads[name] for name in grads}
        c1, c2 = 1 - 0.9**count, 1 - 0.999**count
        params = {
            name: params[name] - RATE * (first[name] / c1) / ((second[name] / c2).sqrt() + 1e-8) for name in grads
        }
        self.state = params, (new_mean, variance, new_scale), (count, first, second)
        prediction = prediction * new_scale + new_mean
        return loss, prediction, (prediction - y).abs()


def medians(sides: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Microseconds of a call."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(21):
        for name, side in sides.items():
            started = time.process_time()
            for _ in range(calls):
                side()
            times[name].append((time.process_time() - started) / calls)
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    x, y = torch.randn(BATCH, 16), 100 * torch.randn(BATCH, 1)
    state, mean, variance, popart = pf.init_state(1), torch.zeros(1), torch.ones(1), pf.popart(1, BETA)
    found = medians(
        {
            "by hand": lambda: art_by_hand(mean, variance, y),
            "pf.art": lambda: pf.art(state, y, step_size=BETA),
            "popart(...).art": lambda: popart.art(state, y),
        },
        200,
    )
    learner = pf.popart_learner(pf.stateless(make()), pf.adam(RATE), popart)
    held = [learner.init(pf.init_params(make, 0))]

    def update() -> None:
        held[0], _ = learner.update(held[0], (x, y))

    scanned, one_step = [held[0]], (x[None], y[None])

    def scan() -> None:
        scanned[0], _ = pf.scan(learner.update, scanned[0], one_step, engine="native")

    scan()
    in_place, pure = InPlace(), Pure()
    steps = {
        "in place": lambda: in_place.update(x, y),
        "pure": lambda: pure.update(x, y),
        "learner.update": update,
        "scan of one step": scan,
    }
    for title, times in (("art", found), ("a step with Adam", medians(steps, 20))):
        print(title)
        first = next(iter(times.values()))
        for name, taken in times.items():
            print(f"  {name:16} {taken:7.0f} µs  {taken / first:5.2f}")


if __name__ == "__main__":
    main()
