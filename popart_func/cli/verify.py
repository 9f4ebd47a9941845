"""``popart-func verify``: checks of the claims of the papers and of this library."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import CycloptsError, Parameter

from popart_func.cli._parameters import (
    ENGINE_NAMES,
    Device,
    File,
    Picture,
    check_among,
    check_engine,
    whole_number,
    words,
)
from popart_func.display.table import print_table
from popart_func.engines import EngineUnavailableError, available_engines

__all__ = ["verify"]

SEEDS = 1000


def _check_check(_: Any, name: str) -> None:
    from popart_func.verify import CHECKS

    check_among([name], CHECKS)


def verify(
    *,
    seeds: Annotated[int | None, whole_number(1, 2**32), Parameter(show_default=lambda _: f"{SEEDS}")] = None,
    seed: Annotated[int | None, whole_number(0, 2**32 - 1)] = None,
    check: Annotated[tuple[Annotated[str, Parameter(validator=_check_check)], ...] | None, words()] = None,
    dtype: Literal["float32", "float64"] = "float32",
    device: Device = "cpu",
    engine: Annotated[
        str, Parameter(validator=check_engine, help=f"The engine to compare with eager: {', '.join(ENGINE_NAMES)}.")
    ] = "auto",
    json: File = None,
    plot: Picture = None,
) -> int:
    """Check the claims of the papers and of this library on random networks, data and statistics of any magnitude.

    Each check computes one thing in two ways, by the library and independently of it, for all seeds at once, and
    compares the difference with what rounding allows. Prints a table. The exit status is 1 if a check fails, or if a
    check that was asked for by name can't run here.

    To see a failure again: popart-func verify --check NAME --seed SEED

    Parameters
    ----------
    seeds
        How many seeds: 0, 1, ..., one less than this number.
    seed
        This seed alone, instead.
    check
        Which checks, one or more names as in the table; by default all.
    dtype
        What the library computes in. Either is compared with float64.
    device
        Where to run: cpu, cuda, cuda:1.
    json
        Also write the results to this file.
    plot
        Also draw the errors of all seeds, check by check, to this file, such as errors.png.
    """
    import json as json_format

    import torch

    from popart_func.verify import CHECKS, report, run
    from popart_func.verify.checks.lanes import engine_to_check

    if seeds is not None and seed is not None:
        raise CycloptsError(msg=f"Give --seeds {seeds} or --seed {seed}, not both.")
    reason = None if engine == "auto" else available_engines(device)[engine]
    if reason is not None:
        raise EngineUnavailableError(f"the engine {engine!r} can't run on {device}: {reason}")
    numbers = range(seeds or SEEDS) if seed is None else [seed]
    with report.progress(check or list(CHECKS)) as on_progress:
        outcomes = run(
            check,
            seeds=numbers,
            dtype=getattr(torch, dtype),
            device=device,
            engine=engine,
            on_progress=on_progress,
        )
    print_table(report.table(outcomes), report.WIDTH)
    if json is not None:
        content = report.as_json(
            outcomes,
            dtype=dtype,
            device=device,
            engine=engine_to_check(torch.device(device), engine),
            first_seed=numbers[0],
            last_seed=numbers[-1],
        )
        json.write_text(json_format.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {json}")
    if plot is not None and any(outcome.seeds for outcome in outcomes):
        from popart_func.verify.plot import errors

        errors(outcomes, plot, setting=f"{dtype} on {device}")
        print(f"wrote {plot}")
    return int(any(outcome.passed is False or (check and outcome.skipped) for outcome in outcomes))
