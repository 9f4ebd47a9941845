"""Who runs the chunks: this process, processes beside it, or a Ray cluster. Results come as they are done.

Functions travel to workers by cloudpickle, results come back as arrays; only the caller writes files. However the
caller ends, its workers end too: processes beside it look for it every second, Ray's are ended by Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from popart_func.sweeps.grid import Chunk, Values
from popart_func.sweeps.job import Work

__all__ = ["Workers", "completed"]

Workers = int | str | None
"""None: this process; a number: so many processes beside it; ``"ray"``, or a Ray client's address ``"ray://..."``."""

RETRIES = 3
"""How often a chunk is given to another worker where its worker died."""

_QUEUED, _SECONDS = 2, 1.0


def completed(work: Work, chunks: list[Chunk], workers: Workers) -> Iterator[tuple[Chunk, Values]]:
    """Runs chunks, and gives each with its results as soon as they are there, in any order.

    Args:
        work: the sweep.
        chunks: what to run.
        workers: who runs it.

    Raises:
        ModuleNotFoundError: ``workers="ray"``, and no ray.
        ConnectionError: there is no such Ray cluster.
        ChildProcessError: workers keep dying.
    """
    if workers is None or not chunks:
        return ((chunk, work.run(chunk)) for chunk in chunks)
    if isinstance(workers, int):
        return _local(work, chunks, workers)
    return _ray(work, chunks, None if workers == "ray" else workers)


def _local(work: Work, chunks: list[Chunk], workers: int) -> Iterator[tuple[Chunk, Values]]:
    """Through loky: `concurrent.futures` whose processes take any function, and whose death is noticed."""
    from loky import ProcessPoolExecutor

    threads = max(1, torch.get_num_threads() // workers)
    left, deaths = list(chunks), 0
    while left:
        executor = ProcessPoolExecutor(workers, initializer=_begin, initargs=(work, threads, os.getpid()))
        try:
            for chunk, values in _streamed(executor.submit, left[:], _QUEUED * workers):
                yield chunk, values
                left.remove(chunk)
                deaths = 0
        except BrokenExecutor as error:
            deaths += 1
            if deaths > RETRIES:
                raise ChildProcessError(f"run: worker processes died {deaths} times in a row: {error}") from error
        finally:
            executor.shutdown(kill_workers=True)


def _streamed(submit: Callable[..., Any], chunks: list[Chunk], at_once: int) -> Iterator[tuple[Chunk, Values]]:
    waiting, running = iter(chunks), dict[Any, Chunk]()
    while True:
        for chunk in islice(waiting, at_once - len(running)):
            running[submit(_run_here, chunk)] = chunk
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            chunk = running[future]
            yield chunk, future.result()
            del running[future]


_work: Work | None = None


def _begin(work: Work, threads: int, caller: int) -> None:
    """Gets a worker process ready. An interrupt from the keyboard is the caller's business."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    torch.set_num_threads(threads)
    _work = work


def _end_with(caller: int) -> None:
    """Ends this process once its caller is gone, which a kill gives no time to say: an orphan has another parent."""
    while os.getppid() == caller:
        time.sleep(_SECONDS)
    os._exit(1)


def _run_here(chunk: Chunk) -> Values:
    assert _work is not None
    return _work.run(chunk)


def _ray(work: Work, chunks: list[Chunk], address: str | None) -> Iterator[tuple[Chunk, Values]]:
    """Each chunk is a task, which Ray gives to another worker if its own dies."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "run: `workers` 'ray' needs ray, which is not installed: pip install 'popart-func[ray]'", name="ray"
        ) from None

    with _cluster(address):
        here = work.environment()
        reference = ray.put(work)
        gpus = int(work.device.type == "cuda")
        task = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=gpus)(_run_there)
        at_once = _QUEUED * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, running = iter(chunks), dict[Any, Chunk]()
        try:
            while True:
                for chunk in islice(waiting, at_once - len(running)):
                    running[task.remote([reference], chunk, here)] = chunk
                if not running:
                    return
                (first, *_), _ = ray.wait(list(running))
                try:
                    values = ray.get(first)
                except ray.exceptions.WorkerCrashedError as error:
                    raise ChildProcessError(f"run: workers died {RETRIES + 1} times with the same chunk.") from error
                yield running.pop(first), values
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)


_fetched: dict[Any, Work] = {}


def _run_there(reference: list[Any], chunk: Chunk, expected: dict[str, str]) -> Values:
    """Runs a chunk in a Ray worker, which fetches the work once: what an engine has compiled is kept with it."""
    import ray

    if reference[0] not in _fetched:
        _fetched.clear()
        _fetched[reference[0]] = ray.get(reference[0])
    work = _fetched[reference[0]]
    here = work.environment()
    if here != expected:
        raise RuntimeError(
            f"run: a worker must be like the machine that the sweep was started on, or its numbers differ in the last "
            f"bits: expected {expected}, got {here}."
        )
    return work.run(chunk)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The cluster that this process is connected to, else the one that `ray.init` finds, until it is not needed."""
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        asked = address or os.environ.get("RAY_ADDRESS") or "a cluster of its own"
        raise ConnectionError(f"run: `workers` 'ray' can't connect to {asked}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
