"""Workers: chunks run in this process, in processes beside it, by an executor, or on a Ray cluster.

Results come as they are done. Functions travel to workers by cloudpickle, results come back as arrays; only the caller
writes files. However the caller ends, its workers end too: processes beside it check every second that it lives, and
Ray ends its own. The jobs of an executor are the executor's.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import cloudpickle
import torch

from popart_func.sweeps.job import Job
from popart_func.sweeps.schema import Arrays, Chunk

__all__ = ["Executor", "Workers", "run_chunks"]


@runtime_checkable
class Executor(Protocol):
    """What runs functions elsewhere: any `concurrent.futures.Executor`, and whatever has its ``submit``."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begins ``function(*arguments)``, and returns what has ``done()``, ``result()`` and, perhaps, ``cancel()``."""


Workers = int | str | Executor | None
"""None: this process. A number: so many processes beside it. An executor: each chunk is a job of it. ``"ray"``, or a
Ray client's address ``"ray://..."``."""

RETRIES = 3
"""How often a chunk whose worker died is given to another worker, and how often a connection to Ray is tried."""

_QUEUED = 2
"""How many chunks are handed out for each worker, so that none waits for its next one."""

_SECONDS = 1.0
"""How often a worker process checks that its caller lives."""


def run_chunks(job: Job, chunks: list[Chunk], workers: Workers) -> Iterator[tuple[Chunk, Arrays]]:
    """Runs chunks, and yields each with its results as soon as it is done, in any order.

    Args:
        job: the sweep.
        chunks: the chunks to run.
        workers: which workers run them.

    Raises:
        ModuleNotFoundError: ``workers="ray"``, and ray is not installed.
        ConnectionError: there is no such Ray cluster.
        ChildProcessError: workers keep dying.
    """
    if workers is None or not chunks:
        return ((chunk, job.run(chunk)) for chunk in chunks)
    if isinstance(workers, int):
        return _local(job, chunks, workers)
    if not isinstance(workers, str):
        return _executed(job, chunks, workers)
    return _ray(job, chunks, None if workers == "ray" else workers)


def _local(job: Job, chunks: list[Chunk], workers: int) -> Iterator[tuple[Chunk, Arrays]]:
    """Runs chunks in processes beside this one, through loky: they take any function, and their death is noticed."""
    from loky import ProcessPoolExecutor

    threads = max(1, torch.get_num_threads() // workers)
    left, deaths = list(chunks), 0
    while left:
        executor = ProcessPoolExecutor(workers, initializer=_begin, initargs=(job, threads, os.getpid()))
        try:
            for chunk, results in _streamed(executor.submit, left[:], _QUEUED * workers):
                yield chunk, results
                left.remove(chunk)
                deaths = 0
        except BrokenExecutor as error:
            deaths += 1
            if deaths > RETRIES:
                raise ChildProcessError(f"run: worker processes died {deaths} times in a row: {error}") from error
        finally:
            executor.shutdown(kill_workers=True)


def _streamed(submit: Callable[..., Any], chunks: list[Chunk], at_once: int) -> Iterator[tuple[Chunk, Arrays]]:
    """Submits chunks, never more than ``at_once``, so that few results wait in memory."""
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


_job: Job | None = None


def _begin(job: Job, threads: int, caller: int) -> None:
    """Prepares a worker process."""
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard interrupts the caller, which then ends its workers
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    torch.set_num_threads(threads)
    _job = job


def _end_with(caller: int) -> None:
    """Ends this process once its caller is gone: an orphan has another parent. A killed caller can't say goodbye."""
    while os.getppid() == caller:
        time.sleep(_SECONDS)
    os._exit(1)


def _run_here(chunk: Chunk) -> Arrays:
    assert _job is not None
    return _job.run(chunk)


def _executed(job: Job, chunks: list[Chunk], executor: Executor) -> Iterator[tuple[Chunk, Arrays]]:
    """Gives an executor each chunk as a job, all at once: how many run at a time is the executor's affair."""
    sent = SentJob(cloudpickle.dumps(job), job.environment())
    running: dict[Any, Chunk] = {}
    try:
        # Within `batch`, submitit makes one array of Slurm's of all jobs.
        with getattr(executor, "batch", nullcontext)():
            for chunk in chunks:
                running[executor.submit(sent, chunk)] = chunk
        while running:
            for future in _first_done(running):
                yield running[future], future.result()
                del running[future]
    except BrokenExecutor as error:
        raise ChildProcessError(
            f"run: the executor broke: {error}. With `store`, the same call and a new executor go on from here."
        ) from error
    finally:
        for unfinished in running:
            with suppress(Exception):
                unfinished.cancel()


def _first_done(futures: Iterable[Any]) -> list[Any]:
    """Waits until some are done, and returns them."""
    listed = list(futures)
    if all(isinstance(future, Future) for future in listed):
        return list(wait(listed, return_when=FIRST_COMPLETED).done)
    while not (found := [future for future in listed if future.done()]):
        time.sleep(_SECONDS / 10)
    return found


class SentJob:
    """A function of a chunk that can be sent anywhere. A thread of a worker keeps the job that it has unpacked last.

    Args:
        packed: the job, by cloudpickle: an executor's own pickle can't send functions that were defined in a notebook.
        environment: the caller's.
    """

    _unpacked = threading.local()

    def __init__(self, packed: bytes, environment: dict[str, str]) -> None:
        self._packed, self._environment = packed, environment

    def __call__(self, chunk: Chunk) -> Arrays:
        """Runs a chunk."""
        if getattr(self._unpacked, "packed", None) != self._packed:
            self._unpacked.job, self._unpacked.packed = cloudpickle.loads(self._packed), self._packed
        job: Job = self._unpacked.job
        _check_environment(job, self._environment)
        return job.run(chunk)

    def checkpoint(self, chunk: Chunk) -> Any:
        """What submitit asks for when Slurm preempts a job, or its time is up: the same chunk once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, chunk)


def _ray(job: Job, chunks: list[Chunk], address: str | None) -> Iterator[tuple[Chunk, Arrays]]:
    """Runs chunks on a Ray cluster. Each is a task, which Ray gives to another worker if its own dies."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "run: `workers` 'ray' needs ray, which is not installed: pip install 'popart-func[ray]'", name="ray"
        ) from None

    with _cluster(address):
        here = job.environment()
        reference = ray.put(job)
        gpus = int(job.device.type == "cuda")
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
                    results = ray.get(first)
                except ray.exceptions.WorkerCrashedError as error:
                    raise ChildProcessError(f"run: workers died {RETRIES + 1} times with the same chunk.") from error
                yield running.pop(first), results
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)


_fetched: dict[Any, Job] = {}


def _run_there(reference: list[Any], chunk: Chunk, expected: dict[str, str]) -> Arrays:
    """Runs a chunk in a Ray worker. The worker fetches the job once, and keeps what an engine has compiled for it."""
    import ray

    if reference[0] not in _fetched:
        _fetched.clear()
        _fetched[reference[0]] = ray.get(reference[0])
    job = _fetched[reference[0]]
    _check_environment(job, expected)
    return job.run(chunk)


def _check_environment(job: Job, expected: dict[str, str]) -> None:
    """Raises if this process would compute other bits than the one that started the sweep."""
    here = job.environment()
    if here != expected:
        raise RuntimeError(
            f"run: a worker must be like the machine that the sweep was started on, or its numbers differ in the last "
            f"bits: expected {expected}, got {here}."
        )


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster for a block: to the one this process is connected to, else to the one `ray.init` finds."""
    import ray

    if ray.is_initialized():
        yield
        return
    for left in reversed(range(RETRIES)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            break
        except (ConnectionError, RuntimeError, ValueError) as error:
            # Now and then the process that Ray's server forks for a client dies at once: then connect again.
            if isinstance(error, ConnectionAbortedError) and left:
                continue
            asked = address or os.environ.get("RAY_ADDRESS") or "a cluster of its own"
            raise ConnectionError(f"run: `workers` 'ray' can't connect to {asked}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
