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
from popart_func.experiments.reward_scales.roster import Setting, has_statistics
from popart_func.experiments.reward_scales.tasks import TASKS, score_of_scales
from popart_func.experiments.reward_scales.tuning import Tuned
from popart_func.sweeps.files import write_atomically
from popart_func.sweeps.statistics import bootstrap_interval

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["draw_curves", "draw_scores", "label_of", "style_of", "summary", "table", "write"]

WINDOWS = 40
"""How many points a learning curve of returns has: each is the mean return of the episodes between two of them."""

_ALGORITHMS = {"q": "Q-learning", "dqn": "DQN", "ppo": "PPO", "vtrace": "V-trace", "stream": "streaming Q(λ)"}
_TREATMENTS = {
    "plain": "plain",
    "art": LABELS["art"],
    "popart": LABELS["popart"],
    "normalized": "normalized",
    "clipped": "clipped rewards",
    "scaled": "scaled rewards",
    "shared": "one shared statistic",
}
_COLORS = {
    "plain": "#D55E00",
    "art": "#009E73",
    "popart": "#0072B2",
    "normalized": "#00304D",
    "clipped": "#E69F00",
    "scaled": "#CC79A7",
    "shared": "#56B4E9",
}
_DASHES = {"q": "-", "dqn": "--", "ppo": ":", "vtrace": "-.", "stream": (0, (1, 1))}


def summary(
    datasets: Mapping[str, xarray.Dataset], tuned: Mapping[str, Mapping[str, Tuned]] | None = None
) -> dict[str, Any]:
    """Scores with their 95 % bootstrap intervals, as plain data.

    ``{"experiments": {"catch_scale": {"agents": {"dqn-popart": {"score": ..., "low": ..., "high": ...,
    "by_scale": {"0.001": ...}, "intervals": {"0.001": [low, high]}, "seconds": ..., "learning_rate": ...}}, ...}}}``

    Args:
        datasets: what `play.play` returned, by the name of the experiment.
        tuned: what `tuning.tune` returned, by the name of the experiment: an agent's ``"tuning"`` holds the scores of
            the whole grid.
    """
    experiments = {}
    for task, dataset in datasets.items():
        runs = TASKS[task].scores(dataset)
        whole = bootstrap_interval(runs, _score_of_runs, stratify="reward_scale")
        each = bootstrap_interval(runs, lambda values, dims: values.mean(dims))
        agents = {}
        for name in map(str, dataset["agent"].values):
            score, by_scale, of_agent = (part.sel(agent=name) for part in (whole, each, dataset))
            scales = [f"{scale:g}" for scale in dataset["reward_scale"].values]
            ends = zip(by_scale["low"].values.tolist(), by_scale["high"].values.tolist(), strict=True)
            agents[name] = {
                **{end: float(score[end]) for end in ("low", "high")},
                "score": float(score["estimate"]),
                "by_scale": dict(zip(scales, by_scale["estimate"].values.tolist(), strict=True)),
                "intervals": dict(zip(scales, map(list, ends), strict=True)),
                "episodes": float(of_agent["episodes"].isel(step=-1).mean()),
                **{number: float(of_agent[number]) for number in ("seconds", *Setting._fields)},
            }
            if tuned is not None:
                agents[name]["tuning"] = _grid(tuned[task][name])
        experiments[task] = {
            "agents": agents,
            "seeds": dataset.sizes["seed"],
            "actions": int(dataset["step"][-1]),
            "seconds": float(dataset["seconds"].sum()),
        }
    return {"experiments": experiments}


def write(
    datasets: Mapping[str, xarray.Dataset],
    directory: str | Path,
    tuned: Mapping[str, Mapping[str, Tuned]] | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Writes ``summary.json``, ``scores.png`` and, for each experiment, ``curves_<experiment>.png``.

    Args:
        datasets: what `play.play` returned, by the name of the experiment.
        directory: where to.
        tuned: as in `summary`.

    Returns:
        The summary, and the paths that were written.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    found = summary(datasets, tuned)
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
    from rich.console import Group

    tables = []
    for task, experiment in found["experiments"].items():
        rows, scales = [], list(next(iter(experiment["agents"].values()))["by_scale"])
        for name, agent in experiment["agents"].items():
            setting = f"{agent['learning_rate']:g}", f"{agent['step_size']:g}" if has_statistics(name) else ""
            numbers = [f"{agent['by_scale'][scale]:.2f}" for scale in scales]
            rows.append((name, *setting, *numbers, f"{agent['score']:.2f} ({agent['low']:.2f}-{agent['high']:.2f})"))
        columns = ("agent", "rate", "step", *scales, "score")
        tables.append(
            make_table(columns, [rows], words=("agent",), title=f"{task}: scores by the scale of the rewards")
        )
    return Group(
        *tables,
        "1: no regret; 0: that of a random agent. Means over seeds. Score: half the",
        "mean over scales, half the mean minus the standard deviation (95 % bootstrap",
        f"interval). Rate: of learning; step: of the statistics{_how_tuned(found)}",
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
            style = style_of(name)
            axes.plot(scales, list(agent["by_scale"].values()), label=label_of(name), marker="o", markersize=3, **style)
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
    agents = [str(name) for name in dataset["agent"].values]
    canvas = new_canvas((max(6.0, 4.2 * len(agents)), 4.2))
    panels = canvas.subplots(1, len(agents), sharey=True, squeeze=False)[0]
    ends = bootstrap_interval(_returns(dataset), resamples=200)
    for axes, name in zip(panels, agents, strict=True):
        for i, scale in enumerate(dataset["reward_scale"].values):
            line = ends.sel(agent=name, reward_scale=scale)
            color = f"C{i}"
            axes.plot(line["step"], line["estimate"], label=f"rewards x {scale:g}", color=color, linewidth=1.2)
            axes.fill_between(line["step"], line["low"], line["high"], alpha=0.2, linewidth=0, color=color)
        axes.set_xlabel("actions")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        set_title(axes, label_of(name))
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


def _grid(tuned: Tuned) -> dict[str, Any]:
    """The scores of a grid of hyper-parameters, one entry for each setting."""
    rows = tuned.scores.to_dataframe("score").reset_index()
    return {"seeds": tuned.seeds, "scores": rows[[*tuned.scores.dims, "score"]].to_dict("records")}


def _how_tuned(found: Mapping[str, Any]) -> str:
    grids = [agent["tuning"] for agent in _agents(found) if "tuning" in agent]
    return f"; tuned at x 1 on {plural(grids[0]['seeds'], 'other seed')}." if grids else "."


def _agents(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [agent for experiment in found["experiments"].values() for agent in experiment["agents"].values()]


def label_of(name: str) -> str:
    """What people call an agent."""
    algorithm, treatment = name.split("-")
    return f"{_ALGORITHMS[algorithm]}, {_TREATMENTS[treatment]}"


def style_of(name: str) -> dict[str, Any]:
    """How an agent's lines are drawn: the color of its treatment, the dashes of its algorithm."""
    algorithm, treatment = name.split("-")
    return {"color": _COLORS[treatment], "linestyle": _DASHES[algorithm], "linewidth": 1.4}


def _legend_of_first(canvas: Any, panels: Any) -> None:
    """A legend of the first panel's lines over all panels, which have the same ones."""
    for axes in panels[1:]:
        for line in axes.get_lines():
            line.set_label("_")
    legend_above(canvas)
