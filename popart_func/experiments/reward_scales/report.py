"""Report of agents on bsuite's scale experiments: scores with intervals, a table, and two kinds of figures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from popart_func.display.canvas import Destination, legend_above, new_canvas, plural, set_title, tidy
from popart_func.display.table import make_table
from popart_func.experiments.names import LABELS
from popart_func.experiments.reward_scales.tasks import TASKS, score_of_scales
from popart_func.sweeps.files import write_atomically
from popart_func.sweeps.statistics import bootstrap_interval

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["draw_curves", "draw_scores", "name_of_agent", "scores", "summary", "table", "write"]

WINDOWS = 40
"""How many points a learning curve of returns has: each is the mean return of the episodes between two of them."""

_ALGORITHMS = {"q": "Q-learning", "dqn": "DQN", "ppo": "PPO", "vtrace": "V-trace"}
_CRITICS = {"plain": "plain", "art": LABELS["art"], "popart": LABELS["popart"], "normalized": "normalized"}
_COLORS = {"plain": "#D55E00", "art": "#009E73", "popart": "#0072B2", "normalized": "#00304D"}
_DASHES = {"q": "-", "dqn": "--", "ppo": ":", "vtrace": "-."}


def name_of_agent(learner: str) -> str:
    """What a summary calls an agent: ``"dqn-popart"``."""
    return learner.replace("_", "-")


def scores(task: str, dataset: xarray.Dataset) -> xarray.DataArray:
    """The score of each run, over learner, reward_scale and seed.

    Args:
        task: one of `tasks.TASKS`.
        dataset: as `play.play` returns it.
    """
    last = dataset.isel(step=-1, drop=True)
    return xarray.apply_ufunc(TASKS[task].score, last["episodes"], last["total_return"], last["best_episode"])


def summary(datasets: Mapping[str, xarray.Dataset]) -> dict[str, Any]:
    """Scores with their 95 % bootstrap intervals, as plain data.

    ``{"experiments": {"catch_scale": {"agents": {"dqn-popart": {"score": ..., "low": ..., "high": ...,
    "by_scale": {"0.001": ...}, "intervals": {"0.001": [low, high]}}}, ...}}}``

    Args:
        datasets: what `play.play` returned, by the name of the experiment.
    """
    experiments = {}
    for task, dataset in datasets.items():
        runs = scores(task, dataset)
        whole = bootstrap_interval(runs, _score_of_runs, stratify="reward_scale")
        each = bootstrap_interval(runs, lambda values, dims: values.mean(dims))
        agents = {}
        for learner in map(str, dataset["learner"].values):
            score, by_scale = whole.sel(learner=learner), each.sel(learner=learner)
            scales = [f"{scale:g}" for scale in dataset["reward_scale"].values]
            ends = zip(by_scale["low"].values.tolist(), by_scale["high"].values.tolist(), strict=True)
            agents[name_of_agent(learner)] = {
                **{name: float(score[name]) for name in ("low", "high")},
                "score": float(score["estimate"]),
                "by_scale": dict(zip(scales, by_scale["estimate"].values.tolist(), strict=True)),
                "intervals": dict(zip(scales, map(list, ends), strict=True)),
                "episodes": float(dataset["episodes"].isel(step=-1).sel(learner=learner).mean()),
            }
        experiments[task] = {
            "agents": agents,
            "seeds": dataset.sizes["seed"],
            "actions": int(dataset["step"][-1]),
            "seconds": float(dataset.attrs["seconds"]),
        }
    return {"experiments": experiments}


def write(datasets: Mapping[str, xarray.Dataset], directory: str | Path) -> tuple[dict[str, Any], list[Path]]:
    """Writes ``summary.json``, ``scores.png`` and, for each experiment, ``curves_<experiment>.png``.

    Args:
        datasets: what `play.play` returned, by the name of the experiment.
        directory: where to.

    Returns:
        The summary, and the paths that were written.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    found = summary(datasets)
    files = {"summary.json": (json.dumps(found, indent=1, allow_nan=False) + "\n").encode()}
    picture = io.BytesIO()
    draw_scores(found, picture)
    files["scores.png"] = picture.getvalue()
    for task, dataset in datasets.items():
        picture = io.BytesIO()
        draw_curves(task, dataset, picture)
        files[f"curves_{task}.png"] = picture.getvalue()
    for name, content in files.items():
        write_atomically(directory / name, content)
    return found, [directory / name for name in files]


def table(found: Mapping[str, Any]) -> Group:
    """A table of scores, for a terminal.

    Args:
        found: as `summary` returns it.
    """
    sections, scales = [], list(dict.fromkeys(scale for one in _agents(found) for scale in one["by_scale"]))
    for task, experiment in found["experiments"].items():
        rows: list[tuple[str, ...]] = []
        for name, agent in experiment["agents"].items():
            numbers = [f"{agent['by_scale'][scale]:.2f}" if scale in agent["by_scale"] else "" for scale in scales]
            score = f"{agent['score']:.2f} ({agent['low']:.2f}-{agent['high']:.2f})"
            rows.append((task if not rows else "", name, *numbers, score))
        sections.append(rows)
    return make_table(
        ("experiment", "agent", *(f"x {scale}" for scale in scales), "score"),
        sections,
        words=("experiment", "agent"),
        title="bsuite's scores by the scale of the rewards, and over all scales",
        notes=[
            "1: no regret; 0: that of a random agent. Means over seeds. The last column is half the mean over scales,",
            "half the mean minus the standard deviation (95 % bootstrap interval)",
        ],
    )


def draw_scores(found: Mapping[str, Any], path: Destination) -> None:
    """Draws score against the scale of the rewards: a panel for each experiment, a line for each agent.

    Args:
        found: as `summary` returns it.
        path: where to write; the suffix says the format. An open file gets a PNG.
    """
    experiments = found["experiments"]
    canvas = new_canvas((max(6.0, 4.2 * len(experiments)), 4.2))
    panels = canvas.subplots(1, len(experiments), sharey=True, squeeze=False)[0]
    for axes, (task, experiment) in zip(panels, experiments.items(), strict=True):
        for name, agent in experiment["agents"].items():
            scales = [float(scale) for scale in agent["by_scale"]]
            low, high = zip(*agent["intervals"].values(), strict=True)
            style = _style(name)
            axes.plot(scales, list(agent["by_scale"].values()), label=_label(name), marker="o", markersize=3, **style)
            axes.fill_between(scales, low, high, alpha=0.2, linewidth=0, color=style["color"])
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("scale of the rewards")
        set_title(axes, f"{task}, {plural(experiment['seeds'], 'seed')}")
        tidy(axes)
    panels[0].set_ylabel("bsuite score, mean and 95 % interval")
    _legend_of_first(canvas, panels)
    canvas.savefig(path)


def draw_curves(task: str, dataset: xarray.Dataset, path: Destination) -> None:
    """Draws the mean return of an episode over time: a panel for each agent, a line for each scale of the rewards.

    Args:
        task: the experiment.
        dataset: as `play.play` returned it.
        path: where to write; the suffix says the format. An open file gets a PNG.
    """
    learners = [str(learner) for learner in dataset["learner"].values]
    canvas = new_canvas((max(6.0, 4.2 * len(learners)), 4.2))
    panels = canvas.subplots(1, len(learners), sharey=True, squeeze=False)[0]
    ends = bootstrap_interval(_returns(dataset), resamples=200)
    for axes, learner in zip(panels, learners, strict=True):
        for i, scale in enumerate(dataset["reward_scale"].values):
            line = ends.sel(learner=learner, reward_scale=scale)
            color = f"C{i}"
            axes.plot(line["step"], line["estimate"], label=f"rewards x {scale:g}", color=color, linewidth=1.2)
            axes.fill_between(line["step"], line["low"], line["high"], alpha=0.2, linewidth=0, color=color)
        axes.set_xlabel("actions")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        set_title(axes, _label(name_of_agent(learner)))
        tidy(axes)
    panels[0].set_ylabel(f"return of an episode of {task.removesuffix('_scale')}")
    _legend_of_first(canvas, panels)
    canvas.savefig(path)


def _returns(dataset: xarray.Dataset) -> xarray.DataArray:
    """The mean return of the episodes that ended in each of `WINDOWS` windows.

    A window in which none ended has the mean of all before, and NaN, a gap, where none has ended yet.
    """
    at = np.linspace(0, dataset.sizes["step"] - 1, WINDOWS + 1).round().astype(int)
    part = dataset.isel(step=np.unique(at))
    episodes, total = part["episodes"].diff("step"), part["total_return"].diff("step")
    so_far = (part["total_return"] / part["episodes"].where(part["episodes"] > 0)).isel(step=slice(1, None))
    return xarray.where(episodes > 0, total / episodes.clip(min=1), so_far)


def _score_of_runs(runs: xarray.DataArray, dims: list[str]) -> xarray.DataArray:
    means = runs.mean("seed")
    return xarray.apply_ufunc(score_of_scales, means, input_core_dims=[["reward_scale"]])


def _agents(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [agent for experiment in found["experiments"].values() for agent in experiment["agents"].values()]


def _label(name: str) -> str:
    algorithm, critic = name.split("-")
    return f"{_ALGORITHMS[algorithm]}, {_CRITICS[critic]}"


def _style(name: str) -> dict[str, Any]:
    algorithm, critic = name.split("-")
    return {"color": _COLORS[critic], "linestyle": _DASHES[algorithm], "linewidth": 1.4}


def _legend_of_first(canvas: Any, panels: Any) -> None:
    """A legend of the first panel's lines over all panels, which have the same ones."""
    for axes in panels[1:]:
        for line in axes.get_lines():
            line.set_label("_")
    legend_above(canvas)
