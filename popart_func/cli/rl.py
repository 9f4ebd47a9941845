"""``popart-func rl``: agents on bsuite's scale experiments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from popart_func.cli._parameters import Directory, Engine, check_among, check_float32, resumable, whole_number, words
from popart_func.display.table import print_table
from popart_func.experiments.names import AGENT_NAMES, SCALE_EXPERIMENTS

__all__ = ["rl"]


def _check_experiments(_: object, names: tuple[str, ...]) -> None:
    check_among(names, SCALE_EXPERIMENTS)


def _check_agents(_: object, names: tuple[str, ...]) -> None:
    check_among(names, AGENT_NAMES)


def rl(
    *,
    experiments: Annotated[tuple[str, ...], words(validator=_check_experiments)] = ("catch_scale",),
    agents: Annotated[tuple[str, ...], words(validator=_check_agents)] = ("q-plain", "q-art", "q-popart"),
    seeds: Annotated[int, whole_number(2, 2**31)] = 100,
    reward_scales: Annotated[
        tuple[Annotated[float, Parameter(validator=(Number(gt=0, lt=math.inf), check_float32))], ...] | None, words()
    ] = None,
    steps: Annotated[int | None, whole_number(1001)] = None,
    tune: bool = False,
    chunk: Annotated[int, whole_number(1)] = 128,
    engine: Engine = "auto",
    out: Directory = Path("rl"),
) -> None:
    """Run agents on bsuite's scale experiments, where rewards are multiplied by 0.001 to 1000.

    Every agent, scale and seed is a lane. Prints bsuite's score at each scale and over all of them. After it was
    killed, the same command goes on from where it was. Writes:

    * **summary.json**: the scores, with 95 % intervals.
    * **scores.png**: scores against the scale of the rewards.
    * **curves_EXPERIMENT.png**: learning curves by scale.
    * **EXPERIMENT/AGENT/lanes.zarr**: every lane's episodes and returns, for xarray.open_zarr.

    For a quick look: popart-func rl --seeds 10 --steps 20000 --out quick

    Parameters
    ----------
    experiments
        Which experiments: bandit_scale, catch_scale, cartpole_scale, mountain_car_scale; and catch_tasks, where one
        network learns seven variants of Catch at once, whose rewards are multiplied by 0.01 to 10,000.
    agents
        Which agents, an algorithm and what it does about the size of rewards: q-popart is Q-learning with Pop-Art.
        catch_tasks has those that begin with q, and q-shared, in which all tasks share one statistic.
    seeds
        How many seeds, from 2 on, since intervals are over seeds. They are numbered from 0.
    reward_scales
        What rewards are multiplied by; by default bsuite's 0.001, 0.03, 1, 30 and 1000. catch_tasks needs seven.
    steps
        How many actions, at least those of the longest episode, rounded up to a multiple of 128; by default bsuite's
        10,000 episodes of the bandit and of Catch, and 200,000 actions of the others.
    tune
        Choose each agent's learning rate and step size of the statistics first: those with the best mean score at
        rewards times 1, on one grid for all agents of an algorithm and on ten seeds that are not reported.
    chunk
        How many lanes run together, and are written together.
    out
        The directory of the results.
    """
    from popart_func.experiments.reward_scales import report
    from popart_func.experiments.reward_scales.play import play
    from popart_func.experiments.reward_scales.tuning import Tuned
    from popart_func.experiments.reward_scales.tuning import tune as tune_agents

    datasets, tuned, names = {}, dict[str, dict[str, Tuned]](), list(dict.fromkeys(agents))
    with resumable(out):
        for task in dict.fromkeys(experiments):
            options: dict[str, Any] = {"steps": steps, "chunk_size": chunk, "engine": engine}
            if tune:
                tuned[task] = tune_agents(task, names, store=out / task / "tuning", **options)
            datasets[task] = play(
                task,
                names,
                reward_scales and list(dict.fromkeys(reward_scales)),
                range(seeds),
                settings={name: one.setting for name, one in tuned.get(task, {}).items()},
                store=out / task,
                **options,
            )
    summary, written = report.write(datasets, out, tuned if tune else None)
    print_table(report.table(summary))
    for path in written:
        print(f"wrote {path}")
