"""Other processes and a Ray cluster give the same bits, also where workers die."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_sweep
import xarray

from popart_func import sweeps
from popart_func.sweeps import load, workers
from popart_func.sweeps.job import Job
from popart_func.sweeps.store import Store

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def alone() -> xarray.Dataset:
    return sweeps.run(**small_sweep.arguments())


class TestProcesses:
    def test_give_the_same_to_the_bit_though_one_is_killed(self, alone, tmp_path):
        arguments = small_sweep.arguments(store=tmp_path / "store", workers=2)
        arguments["init"] = small_sweep.killed_once(arguments["init"], tmp_path / "killed")
        assert sweeps.run(**arguments).equals(alone)
        assert (tmp_path / "killed").exists()
        assert load(tmp_path / "store").equals(alone)

    def test_that_keep_dying_are_given_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workers, "RETRIES", 0)
        arguments = small_sweep.arguments(store=tmp_path / "store", workers=1)
        arguments["init"] = small_sweep.killed_once(arguments["init"], tmp_path / "nowhere" / "killed")
        with pytest.raises(ChildProcessError, match="worker processes died 1 times in a row"):
            sweeps.run(**arguments)

    def test_hand_errors_on(self):
        arguments = small_sweep.arguments(workers=1)
        init = arguments["init"]

        def broken(seed: int) -> Any:
            if seed == 2:
                raise ArithmeticError("seed 2 is broken")
            return init(seed)

        with pytest.raises(ArithmeticError, match="seed 2 is broken"):
            sweeps.run(**{**arguments, "init": broken})

    def test_end_with_a_caller_that_is_killed(self, tmp_path):
        """Each of two holds a pipe open in the middle of a chunk: no writers are left when both are gone."""
        os.mkfifo(tmp_path / "alive")
        pipe = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
        caller = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "support" / "stuck_sweep.py", tmp_path / "alive"]
        )
        try:
            begun = b""
            while begun != b"..":
                assert select.select([pipe], [], [], 60)[0], "they do not begin"
                begun += os.read(pipe, 1)
            assert not select.select([pipe], [], [], 0)[0], "they are at it"
            caller.send_signal(signal.SIGKILL)
            caller.wait()
            assert select.select([pipe], [], [], 60)[0], "they live on"
            assert os.read(pipe, 1) == b"", "the end of the file"
        finally:
            caller.kill()
            caller.wait()
            os.close(pipe)


def test_a_missing_ray_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'popart-func\[ray\]'"):
        sweeps.run(**small_sweep.arguments(workers="ray"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'popart-func[ray]'")
def test_an_address_of_no_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConnectionError, match="run: `workers` 'ray' can't connect to nonsense: Invalid address format"):
        sweeps.run(**small_sweep.arguments(workers="ray"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'popart-func[ray]'")
@pytest.mark.parametrize(("failures", "tries"), [(1, 2), (9, 3)])
def test_a_client_whose_server_dies_connects_again(monkeypatch, failures, tries):
    import ray

    tried = []

    def dies(**_: Any) -> None:
        tried.append(1)
        if len(tried) <= failures:
            raise ConnectionAbortedError("Starting Ray client server failed")
        raise ValueError("connected")

    monkeypatch.setattr(ray, "init", dies)
    expected = "connected" if failures < tries else "Starting Ray client server failed"
    with pytest.raises(ConnectionError, match=expected):
        sweeps.run(**small_sweep.arguments(workers="ray://127.0.0.1:10001"))
    assert len(tried) == tries


# Ray leaves sockets and processes to the end of the process, and warns of what it will change.
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'popart-func[ray]'")
class TestRay:
    @pytest.fixture(scope="class")
    @classmethod
    def client_port(cls) -> int:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return free.getsockname()[1]

    @pytest.fixture(scope="class")
    @classmethod
    def environment(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")  # or a token is written into the user's home
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv(
                "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "10"
            )  # how long a failed start of it is waited for
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, environment: None, client_port: int, tmp_path_factory: Any) -> Iterator[tuple[Any, Path]]:
        """A process that runs the sweep as Ray's client once it is told to. It imports while the cluster starts."""
        code = (
            "import sys, ray, small_sweep; from popart_func import sweeps; input(); "
            "sweeps.run(**small_sweep.arguments(store=sys.argv[1], workers=sys.argv[2])); "
            "assert 'torch._dynamo' not in sys.modules, 'which takes a second to import'"
        )
        store = tmp_path_factory.mktemp("client") / "store"
        process = subprocess.Popen(
            [sys.executable, "-c", code, store, f"ray://127.0.0.1:{client_port}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        yield process, store
        process.kill()
        process.communicate()

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, client: Any, client_port: int) -> Iterator[Any]:
        """Two nodes of one processor each, on this machine."""
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "object_store_memory": 100 << 20, "ray_client_server_port": client_port}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
        ray.init(address=nodes.address, log_to_driver=False)
        yield nodes
        ray.shutdown()
        nodes.shutdown()

    def test_two_nodes_give_the_same_to_the_bit_though_a_worker_is_killed(self, cluster, alone, tmp_path):
        import ray

        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        arguments = small_sweep.arguments(store=tmp_path / "store", workers="ray")
        arguments["init"] = small_sweep.killed_once(arguments["init"], tmp_path / "killed")
        assert sweeps.run(**arguments).equals(alone)
        assert (tmp_path / "killed").exists()
        assert load(tmp_path / "store").equals(alone)

    @pytest.mark.usefixtures("cluster")
    def test_a_client_gives_the_same_to_the_bit(self, client, alone):
        """From a process of its own, for this one is connected already."""
        process, store = client
        _, errors = process.communicate("go\n", timeout=120)
        assert process.returncode == 0, errors
        assert load(store).equals(alone)

    def test_a_cancelled_sweep_goes_on_elsewhere(self, cluster, alone, tmp_path, monkeypatch):
        write, written = Store.write, []

        def interrupted(store, chunk, values):
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(chunk)
            write(store, chunk, values)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sweeps.run(**small_sweep.arguments(store=tmp_path / "store", workers="ray"))
        assert load(tmp_path / "store").attrs["complete"] == 0
        assert sweeps.run(**small_sweep.arguments(store=tmp_path / "store")).equals(alone)

    def test_a_node_that_is_lost(self, cluster, alone, tmp_path, monkeypatch):
        write, lost = Store.write, []

        def and_lose_a_node(store, chunk, values):
            if not lost:
                lost.append(cluster.list_all_nodes()[-1])
                cluster.remove_node(lost[0], allow_graceful=False)
            write(store, chunk, values)

        monkeypatch.setattr(Store, "write", and_lose_a_node)
        found = sweeps.run(**small_sweep.arguments(store=tmp_path / "store", workers="ray"))
        assert len(lost) == 1
        assert found.equals(alone)

    def test_a_worker_unlike_this_machine_is_refused(self, cluster, monkeypatch):

        monkeypatch.setattr(Job, "environment", lambda job: {"processor": "another"})
        with pytest.raises(RuntimeError, match="a worker must be like the machine that the sweep was started on"):
            sweeps.run(**small_sweep.arguments(workers="ray"))


class Deferred:
    """An executor by protocol alone: its jobs are no `concurrent.futures.Future`, and run when they are asked for."""

    class Job:
        def __init__(self, function: Any, arguments: Any) -> None:
            self.call = functools.partial(function, *arguments)
            self.asked = 0

        def done(self) -> bool:
            self.asked += 1
            return self.asked > 1

        def result(self) -> Any:
            return self.call()

    def submit(self, function: Any, /, *arguments: Any) -> Any:
        return self.Job(pickle.loads(pickle.dumps(function)), arguments)


def submitit_executor(kind: str, folder: Path) -> Any:
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    executor = submitit.AutoExecutor(folder, cluster=kind)
    executor.update_parameters(timeout_min=5)
    return executor


EXECUTORS = {
    "by protocol": lambda folder: Deferred(),
    "threads": lambda folder: ThreadPoolExecutor(2),
    "submitit debug": lambda folder: submitit_executor("debug", folder),
    "processes": lambda folder: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")),
    "submitit local": lambda folder: submitit_executor("local", folder),
    "dask": lambda folder: pytest.importorskip("distributed").Client(processes=False).get_executor(),
    "executorlib": lambda folder: pytest.importorskip("executorlib").SingleNodeExecutor(max_workers=2),
    "mpi4py": lambda folder: pytest.importorskip("mpi4py.futures").MPIPoolExecutor(2),
}
SLOW = ("processes", "submitit local", "dask", "executorlib", "mpi4py")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its logs open
@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, make in EXECUTORS.items()]
)
def test_any_executor(make, alone, tmp_path):
    assert sweeps.run(**small_sweep.arguments(workers=make(tmp_path))).equals(alone)


def test_an_executor_hands_errors_on_and_gives_up_the_rest():
    given_up = []

    class Fails(Deferred):
        class Job(Deferred.Job):
            def result(self) -> Any:
                raise ArithmeticError("broken")

            def cancel(self) -> None:
                given_up.append(self)

    with pytest.raises(ArithmeticError, match="broken"):
        sweeps.run(**small_sweep.arguments(workers=Fails()))
    assert len(given_up) == 3 + 5


def test_another_machine_is_refused(monkeypatch):
    class Elsewhere(Deferred):
        def submit(self, function: Any, /, *arguments: Any) -> Any:
            monkeypatch.setattr(Job, "environment", lambda job: {"processor": "another"})
            return super().submit(function, *arguments)

    with pytest.raises(RuntimeError, match="a worker must be like the machine that the sweep was started on"):
        sweeps.run(**small_sweep.arguments(workers=Elsewhere()))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_broken_executor_says_how_to_go_on(alone, tmp_path, at_once):
    class Breaks(Deferred):
        def submit(self, function: Any, /, *arguments: Any) -> Any:
            if arguments[0].number == 1:
                function = fail(arguments) if at_once else fail
            return self.Job(function, arguments)

    def fail(chunk: Any) -> Any:
        raise BrokenExecutor("its process died")

    arguments = small_sweep.arguments(store=tmp_path / "store")
    with pytest.raises(ChildProcessError, match=r"its process died\. With `store`, the same call and a new executor"):
        sweeps.run(**arguments, workers=Breaks())
    assert load(tmp_path / "store").done.any() == (not at_once)
    assert sweeps.run(**arguments, workers=Deferred()).equals(alone)


def test_a_preempted_job_is_the_same_chunk_once_more():
    pytest.importorskip("submitit", reason="needs submitit")
    sent = workers.SentJob(b"", {})
    again = sent.checkpoint("chunk")
    assert (again.function, again.args) == (sent, ("chunk",))


def test_what_is_no_executor_is_refused():
    with pytest.raises(
        ValueError, match="must be None, a number, an executor, 'ray' or 'ray://host:port', got 'slurm'"
    ):
        sweeps.run(**small_sweep.arguments(workers="slurm"))
    with pytest.raises(TypeError, match=r"`workers` must be an executor, got its class: write ThreadPoolExecutor\("):
        sweeps.run(**small_sweep.arguments(workers=ThreadPoolExecutor))
