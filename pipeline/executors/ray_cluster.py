"""The connection to a Ray cluster: one of this machine alone, or one that the configuration names.

By itself Ray listens on all addresses, asks the addresses of clouds who they are, reports usage, and takes
over SIGTERM. A cluster that is started here does none of that, and takes work from this program alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.engines.loading import EngineChoices
from pipeline.errors import EngineUnusable, MissingPackage
from pipeline.executors.base import Executor
from pipeline.executors.beside import (
    MOST_BESIDE,
    PER_CORE,
    BesideGenerator,
    beside,
    engines_beside,
    workers_beside,
)
from pipeline.executors.process import THREADS, n_cores
from pipeline.executors.ray import RayExecutor
from pipeline.executors.ray_environment import AUTO, set_environment
from pipeline.executors.ray_nodes import (
    Facts,
    Resources,
    differences,
    facts_of_this_process,
    living_nodes,
    packages_of,
)
from pipeline.executors.versions import NONE, PROGRAM, versions
from pipeline.fs.bucket import without_credentials

INSTALL_COMMAND = 'pip install ".[ray]"'
OBJECT_STORE_BYTES = 1 << 30  # of shared memory, at most; what does not fit is in files
CONNECT_S = 10.0
FACTS_PATIENCE_S = 60.0  # for the start of a process on a node
TMP, FOLDER = Path("/tmp"), "ray-of-"  # the paths of Ray's sockets must be short
# With this file in the home folder, the head does not ask a cloud's addresses which cloud it is in.
PROVIDER_FILE, PROVIDER = "ray_bootstrap_config.yaml", "provider: {type: local}\n"

log = logging.getLogger("pipeline")


@dataclass
class RayCluster:
    """The executors on a cluster: an `Executors`. The first time they are asked for, it connects."""

    address: str  # host:port, or AUTO: this machine alone
    workers: int | None  # at most; None: as many as the nodes have room for
    resources: Resources
    environment: Mapping[str, str | None]  # of the actors, see `pipeline.executors.ray.RayWorker`
    engines: EngineChoices = field(compare=False)
    idle_s: float = field(compare=False)
    normalizes_ahead: bool = False  # in another actor beside each worker
    on_gpu: bool = False  # workers only generate, and everything else is done by actors beside them
    batch_tracks: int = field(default=8, compare=False)  # of a call of a generator on a GPU
    _executors: list[RayExecutor] = field(default_factory=list, init=False, compare=False)
    _normalizers: list[RayExecutor] = field(default_factory=list, init=False, compare=False)
    _on_cpu: list[RayExecutor] = field(default_factory=list, init=False, compare=False)
    _beside: dict[RayExecutor, list[BesideGenerator]] = field(default_factory=dict, init=False, compare=False)
    # Processes that Ray starts end with the thread that has started them; in another thread than the main one
    # it sets no signal handlers of Python.
    _thread: ThreadPoolExecutor | None = field(default=None, init=False, compare=False)
    _folder: str | None = field(default=None, init=False, compare=False)  # of a local cluster

    def ready(self) -> Sequence[Executor]:
        """As many executors as the nodes that are there now have room for, those with an actor first.

        Raises:
            MissingPackage: Ray is not installed.
            EngineUnusable: the cluster can't be reached, or no node has what a worker needs.
        """
        self.connect()
        nodes = [node["Resources"] for node in living_nodes()]
        n = sum(self.resources.times_in(node) for node in nodes)
        if n == 0:
            raise EngineUnusable(
                f"no node of the cluster has the {self.resources} that a worker needs, see"
                " executor.resources_per_worker"
            )
        n = min(n, self.workers or n)
        while len(self._executors) < n:
            self._executors.append(self._executor(self.resources))
            if self.normalizes_ahead:
                # Beside a GPU there are cores to count; beside a model on the CPU all of them are taken.
                resources = Resources(1.0 if self.resources.gpu else 0.0, 0.0)
                self._normalizers.append(self._executor(resources))
        found = sorted(self._executors, key=lambda one: one.facts is None)[:n]
        if not self.on_gpu:
            return found
        cores_each = (sum(node.get("CPU", 0.0) for node in nodes) - n * self.resources.cpu) / n
        n_beside = workers_beside(cores_each, self.engines)
        groups = [self._beside_of(one, cores_each)[:n_beside] for one in found]
        return [one for group in zip(*groups, strict=True) for one in group]

    def _beside_of(self, generator: RayExecutor, cores: float) -> list[BesideGenerator]:
        """The executors that share a generator, for which there are so many cores."""
        if generator not in self._beside:
            resources = Resources(1 / PER_CORE if PER_CORE * cores >= 1 else 0.0, 0.0)
            executors = [self._executor(resources) for _ in range(MOST_BESIDE)]
            for one in executors:
                one.engines, one.environment = (
                    engines_beside(self.engines, "cpu"),
                    {**one.environment, **thread_variables(1)},
                )
            self._on_cpu += executors
            self._beside[generator] = beside(generator, executors, None, self.batch_tracks)
        return self._beside[generator]

    def normalizers(self) -> list[RayExecutor]:
        return self._normalizers

    def _executor(self, resources: Resources) -> RayExecutor:
        environment: dict[str, str | None] = dict(self.environment)
        if self._folder:
            environment["HOME"] = os.environ.get("HOME")
        return RayExecutor(
            self.engines,
            self.idle_s,
            resources,
            environment,
            self._check,
            leaves_sounds=self.on_gpu and resources == self.resources,
            shares_disk=self._folder is not None,
        )

    def use(self, engines: EngineChoices, idle_s: float, batch_tracks: int) -> None:
        """Change the settings; see `RayExecutor.use`."""
        self.engines, self.idle_s, self.batch_tracks = engines, idle_s, batch_tracks
        for pairs in self._beside.values():
            pairs[0].shared.most_tracks = batch_tracks
        for executor in [*self._executors, *self._normalizers]:
            executor.use(engines, idle_s)
        for executor in self._on_cpu:
            executor.use(engines_beside(engines, "cpu"), idle_s)

    def release_if_idle(self) -> None:
        for executor in [*self._executors, *self._normalizers, *self._on_cpu]:
            executor.release_if_idle()

    def close(self) -> None:
        """End the actors, leave the cluster, and end one that was started here."""
        for executor in [*self._executors, *self._normalizers, *self._on_cpu]:
            executor.close()
        if self._thread is not None:
            import ray

            self._thread.submit(ray.shutdown).result()
            self._thread.shutdown()
            self._thread = None
        self._remove_folder()

    def connect(self) -> None:
        """Raises as `ready`."""
        if self._thread is not None:
            return
        if find_spec("ray") is None:
            raise MissingPackage(f"executor: ray needs ray: {INSTALL_COMMAND}")
        set_environment(self.address)
        thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        try:
            thread.submit(self._start_local if self.address == AUTO else self._join).result()
            _restore_signal_handlers()
        except Exception as e:
            thread.shutdown()  # which ends what was started
            self._remove_folder()
            reason = str(e).strip().partition("\n")[0].rstrip(".")
            log.debug("Ray can't be used", exc_info=e)
            where = f"the Ray cluster (executor.address: {self.address})"
            hint = "" if self.address == AUTO else "; if it asks for a token, set RAY_AUTH_MODE=token"
            raise EngineUnusable(f"{where} can't be used: {reason}{hint}") from e
        self._thread = thread

    def nodes(self) -> list[tuple[Resources, Facts]]:
        """What each node has in all, and its versions. Raises as `ready`."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.connect()
        nodes, asked = living_nodes(), []
        for node in nodes:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(facts_of_this_process)
            asked.append(task.remote(packages_of(self.engines)))
        found = list[tuple[Resources, Facts]]()
        for node, task in zip(nodes, asked, strict=True):
            total = Resources(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            try:
                facts = ray.get(task, timeout=FACTS_PATIENCE_S)
            except RayError as e:
                log.debug("node %s does not answer", node["NodeManagerAddress"], exc_info=e)
                facts = Facts(node["NodeID"], node["NodeManagerAddress"], (), {PROGRAM: NONE})
            found.append((total, facts))
        return found

    def differences(self, facts: Sequence[Facts]) -> list[str]:
        """See `pipeline.executors.ray_nodes.differences`."""
        return list(differences(facts, versions(packages_of(self.engines))))

    def _check(self, facts: Facts) -> None:
        if found := self.differences([facts]):
            raise EngineUnusable(found[0])

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start_local(self) -> None:
        _remove_folders_of_killed_owners()
        self._folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=TMP)
        (Path(self._folder) / PROVIDER_FILE).write_text(PROVIDER)
        # The processes that it starts inherit the environment, which has a bucket's keys, as it is now.
        before = dict(os.environ)
        for name in before.keys() - without_credentials(before).keys():
            del os.environ[name]
        os.environ["HOME"] = self._folder
        try:
            _init(
                address="local",
                num_cpus=n_cores(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._folder,
            )
        finally:
            del os.environ["HOME"]
            os.environ.update(before)

    def _join(self) -> None:
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), CONNECT_S):  # Ray itself would try for many minutes
            pass
        _init(address=self.address)


def thread_variables(threads: int | None) -> dict[str, str | None]:
    """The variables of an actor's libraries: as they are here, or, where they are not set, so many threads.

    None leaves the number to the libraries, whose models then have the threads of a worker process.
    """
    number = None if threads is None else str(threads)
    return {name: os.environ.get(name) or number for name in THREADS}


def _remove_folders_of_killed_owners() -> None:
    for folder in TMP.glob(f"{FOLDER}*"):
        process = folder.name.removeprefix(FOLDER).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)  # another user's can't be removed
        except (OSError, ValueError):
            continue


def _restore_signal_handlers() -> None:
    """Ray's library puts handlers of its own below those of Python, which end the process by an abort."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _init(**options: Any) -> None:
    import ray
    from ray._private import worker

    # What raylets print when a node is lost belongs into the log and not between the lines of the console.
    worker.print_to_stdstream = lambda batch, **_: log.debug("Ray: %s", "\n".join(batch["lines"]))
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
