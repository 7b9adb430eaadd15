"""Tasks in the actors of a Ray cluster, one actor with engines for each executor.

Ray carries work and nothing else: what is queued, finished or tried again stands in the owner's database. The
owner pulls results one by one by calls of the actor, as it does from a worker process. A second group of
calls is answered while a task runs: it stops the task and fetches progress and log records.

Arrays are sent by value. A file is sent by its content, as an actor may run on another machine, unless the
cluster was started here and has this machine alone (`shares_disk`).
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.loading import EngineChoices, LoadedEngines, Wanted
from pipeline.errors import EngineUnusable
from pipeline.executors.base import Task, Tools, WorkerAway, WorkerLost, is_of_a_lost_gpu, portable
from pipeline.executors.judge import ScoringJudge
from pipeline.executors.ray_nodes import Facts, Resources, facts_of_this_process, living_nodes, packages_of
from pipeline.records import Variation

YIELDED, RAISED, DONE = "yielded", "raised", "done"
CONTROL = "control"  # the group of calls that are answered while a task runs
POLL_S = 0.2  # between two questions whether to stop, and for progress
PLACE_PATIENCE_S = 30.0  # how long an actor may wait for a place on the cluster
REMEDY = "install this program there as here, see docs/scale.md"

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class FileContent:
    """A file on its way to an actor, which gives the task a copy of the same name."""

    name: str
    content: bytes


class RayWorker:
    """The actor. It runs one task at a time; another one can be run between two of its results."""

    def __init__(
        self, paths: Sequence[str], environment: Mapping[str, str | None], leaves_sounds: bool = False
    ) -> None:
        """Prepare this process before any library is imported that reads the variables.

        Args:
            paths: where the owner finds modules.
            environment: variables to set, or, for None, to remove: Ray sets the number of threads.
            leaves_sounds: sounds of `tasks.generate` stay in Ray's object store, and the owner gets a
                reference, which it gives to the worker that finishes the sound.
        """
        sys.path.extend(path for path in paths if path not in sys.path)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if n_threads := environment.get("OPENBLAS_NUM_THREADS"):
            from threadpoolctl import threadpool_limits

            threadpool_limits(int(n_threads))  # Ray has loaded numpy's library before it was set
        self._leaves_sounds = leaves_sounds
        self._cache_lock = _take_numba_cache()
        self._engines: LoadedEngines | None = None
        self._kept: dict[str, Any] = {}
        self._results: dict[int, Iterator[Any]] = {}  # of the tasks that have not ended, by their run
        self._files: dict[int, tempfile.TemporaryDirectory[str]] = {}  # likewise
        self._stopped: set[int] = set()  # runs that have been asked to stop
        self._reports: deque[tuple[Any, ...]] = deque()  # for the owner: progress, log records, engines
        log.setLevel(logging.DEBUG)
        log.propagate = False
        log.addHandler(_ToReports(self._reports))

    def open(self, choices: EngineChoices, packages: Sequence[str]) -> Facts:
        """Take the choice of engines."""
        embedder, generator, rater = (wanted and _on_this_machine(wanted) for wanted in choices)
        assert embedder and generator

        def tell(loaded: list[str]) -> None:
            self._reports.append((loaded,))

        self._engines = LoadedEngines(embedder, generator, rater, on_change=tell)
        return facts_of_this_process(packages)

    def begin(self, run: int, task: Task, args: Sequence[Any]) -> tuple[str, Any, list[Any]]:
        """Begin a task; the answer is that of `next`."""
        assert self._engines is not None

        def should_stop() -> bool:
            return run in self._stopped

        tools = Tools(
            engines=self._engines,
            judge=ScoringJudge(self._engines, should_stop),
            progress=lambda *step: self._reports.append(step),
            should_stop=should_stop,
            kept=self._kept,
        )
        try:
            received = [self._received(run, value) for value in args]
        except WorkerAway as e:
            self._forget(run)
            return RAISED, portable(e), self.reports()
        self._results[run] = task(tools, *received)
        return self.next(run)

    def next(self, run: int) -> tuple[str, Any, list[Any]]:
        """The next result of a task, or how it has ended; with the reports up to then."""
        try:
            kind, content = YIELDED, self._left(next(self._results[run]))
        except StopIteration:
            kind, content = DONE, None
        except BaseException as e:  # Stopped among them
            kind, content = RAISED, portable(e)
        if kind != YIELDED:
            self._forget(run)
        return kind, content, self.reports()

    def close(self, run: int) -> tuple[str, Any, list[Any]]:
        """End a task of which no more is wanted, if it has not ended."""
        try:
            if run in self._results:
                self._results[run].close()  # type: ignore[attr-defined]
        except BaseException as e:
            log.warning("a task that was ended raised %r", e)
        self._forget(run)
        return DONE, None, self.reports()

    def stop(self, run: int) -> None:
        """Ask a task to stop; it may not have begun yet. Called in the control group."""
        self._stopped.add(run)

    def reports(self) -> list[tuple[Any, ...]]:
        """What there is to report since the last call. Called in the control group, too."""
        found = []
        with suppress(IndexError):
            while True:
                found.append(self._reports.popleft())
        return found

    def _left(self, result: Any) -> Any:
        import ray

        if self._leaves_sounds and isinstance(result, tuple) and isinstance(result[-1], Variation):
            return *result[:-1], ray.put(result[-1])
        return result

    def _received(self, run: int, value: Any) -> Any:
        import ray

        if isinstance(value, ray.ObjectRef):
            try:
                return ray.get(value)
            except ray.exceptions.RayError as e:
                raise WorkerAway("a sound is lost with the node that made it") from e
        if not isinstance(value, FileContent):
            return value
        if run not in self._files:
            self._files[run] = tempfile.TemporaryDirectory(prefix="variations-")
        path = Path(self._files[run].name) / value.name
        path.write_bytes(value.content)
        return path

    def _forget(self, run: int) -> None:
        self._results.pop(run, None)
        self._stopped.discard(run)
        if folder := self._files.pop(run, None):
            folder.cleanup()


def _take_numba_cache() -> IO[str]:
    """Let numba use the first of its caches that no other process uses; returns the lock on it, to be kept.

    A cache has no lock of its own, and two processes that filled an empty one at the same time have crashed.
    """
    folder = Path(os.environ.get("NUMBA_CACHE_DIR") or Path.home() / ".cache" / "variations" / "numba")
    for n in itertools.count():
        cache = folder / str(n)
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        os.environ["NUMBA_CACHE_DIR"] = str(cache)
        return lock
    raise AssertionError


class _ToReports(logging.Handler):
    def __init__(self, reports: deque[tuple[Any, ...]]) -> None:
        super().__init__()
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        self._reports.append((record.levelno, record.getMessage()))


def _on_this_machine(wanted: Wanted) -> Wanted:
    """Without the folder for files that save an engine work, where the state folder can't be reached."""
    choice, settings = wanted
    folder = settings.state_dir
    if folder is not None and not folder.parent.is_dir():
        settings = replace(settings, state_dir=None)
    return choice, settings


@dataclass(eq=False)
class RayExecutor:
    """Runs tasks in one actor, which the next task starts again after its death or `close`."""

    engines: EngineChoices
    idle_s: float  # without a task, after which the actor is ended to free its memory and its place
    resources: Resources
    environment: Mapping[str, str | None]  # see `RayWorker`
    check: Callable[[Facts], None]  # raises EngineUnusable for a node that can't be used
    leaves_sounds: bool = False  # see `RayWorker`
    shares_disk: bool = False  # see `Executor`
    clock: Callable[[], float] = time.monotonic
    place_patience_s: float = PLACE_PATIENCE_S
    facts: Facts | None = field(default=None, init=False)  # of the actor's process; None: there is no actor
    loaded: list[str] = field(default_factory=list, init=False)  # see `Executor`
    _actor: Any = field(default=None, init=False)
    _used_at: float = field(default=0.0, init=False)
    _n_runs: int = field(default=0, init=False)

    @property
    def where(self) -> str:
        """The node and its GPUs on which the tasks run."""
        return "a node of the cluster" if self.facts is None else self.facts.where

    def run(self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn) -> Iterator[Any]:
        """See `pipeline.executors.base.Executor`.

        Raises:
            WorkerAway: also if the cluster has no place for the actor.
            EngineUnusable: the node can't be used.
        """
        if self._actor is None:
            self._start(should_stop)
        actor = self._actor
        try:
            yield from self._run(actor, task, args, progress, should_stop)
        except Exception as e:
            if self._actor is actor and (isinstance(e, WorkerLost | WorkerAway) or is_of_a_lost_gpu(e)):
                self.close()
            raise
        finally:
            self._used_at = self.clock()

    def use(self, engines: EngineChoices, idle_s: float) -> None:
        """Change the settings. For other engines the next task starts another actor; see `process`."""
        if engines != self.engines:
            self.close()
        self.engines, self.idle_s = engines, idle_s

    def release_if_idle(self) -> None:
        """See `pipeline.executors.base.Executor`."""
        if self._actor is not None and self.clock() - self._used_at > self.idle_s:
            log.info("the engines on %s are idle and give their memory back", self.where)
            self.close()

    def close(self) -> None:
        """See `pipeline.executors.base.Executor`."""
        if self._actor is not None:
            _kill(self._actor)
            self._actor = self.facts = None
            self.loaded = []

    def _start(self, should_stop: StopFn) -> None:
        import ray

        options = {"num_cpus": self.resources.cpu, "num_gpus": self.resources.gpu, "max_restarts": 0}
        actor_class = ray.remote(concurrency_groups={CONTROL: 1}, **options)(RayWorker)
        actor = actor_class.remote(sys.path, self.environment, self.leaves_sounds)
        opened = actor.open.remote(self.engines, packages_of(self.engines))
        began, is_reported = self.clock(), False
        try:
            while not ray.wait([opened], timeout=POLL_S)[0]:
                check_stop(should_stop)
                waited_s = self.clock() - began
                if waited_s > self.place_patience_s:
                    raise WorkerAway(f"the cluster has no free {self.resources} for a worker")
                if waited_s > self.place_patience_s / 3 and not is_reported:
                    log.info("waiting for a free %s on the cluster", self.resources)
                    is_reported = True
            self.facts = self._get(opened)
            self.check(self.facts)
        except BaseException:
            _kill(actor)
            self.facts = None
            raise
        self._actor = actor
        log.debug("a worker runs on %s", self.where)

    def _run(
        self, actor: Any, task: Task, args: tuple[Any, ...], progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Any]:
        self._n_runs += 1
        run, kind = self._n_runs, YIELDED
        call = actor.begin.remote(run, task, [value if self.shares_disk else _sent(value) for value in args])
        try:
            while kind == YIELDED:
                kind, content = self._answer(actor, call, run, progress, should_stop)
                if kind == RAISED:
                    raise content
                if kind == YIELDED:
                    yield content
                    call = actor.next.remote(run)
        except (WorkerLost, WorkerAway):
            kind = DONE
            raise
        finally:
            if kind == YIELDED:  # the caller wants no more
                with suppress(WorkerLost, WorkerAway):
                    self._answer(actor, actor.close.remote(run), run, lambda *_: None, should_stop)

    def _answer(
        self, actor: Any, call: Any, run: int, progress: ProgressFn, should_stop: StopFn
    ) -> tuple[str, Any]:
        import ray

        was_told = False
        while True:
            if not was_told and should_stop():
                actor.stop.options(concurrency_group=CONTROL).remote(run)
                was_told = True
            is_ready = bool(ray.wait([call], timeout=POLL_S)[0])
            if is_ready:
                kind, content, reports = self._get(call)
            else:
                reports = self._get(actor.reports.options(concurrency_group=CONTROL).remote())
            for report in reports:
                match report:
                    case (loaded,):
                        self.loaded = loaded
                    case (level, text):
                        log.log(level, "%s", text)
                    case step:
                        progress(*step)
            if is_ready:
                return kind, content

    def _get(self, call: Any) -> Any:
        """The value of a call of the actor."""
        import ray
        from ray import exceptions

        try:
            return ray.get(call)
        except exceptions.RayError as e:
            raise self._lost(e) from e

    def _lost(self, error: Exception) -> WorkerLost | EngineUnusable:
        """Whose fault a loss is: a process that dies while its node lives may have been killed by a track."""
        from ray import exceptions

        if isinstance(error, exceptions.RayTaskError) or getattr(error, "actor_init_failed", False):
            reason = str(error).strip().splitlines()[-1]  # outside of tasks: such as a module that is missing
            return EngineUnusable(f"a node of the cluster can't run workers ({reason}): {REMEDY}")
        alive = {node["NodeID"] for node in living_nodes()}
        has_died = isinstance(error, exceptions.ActorDiedError | exceptions.OutOfMemoryError)
        if has_died and (self.facts is None or self.facts.node_id in alive):
            detail = re.search(r"exit detail: (.*?)\.( |$)", str(error).replace("\n", " "))
            how = f": {detail[1]}" if detail else ""
            return WorkerLost(f"the worker's process on {self.where} has died{how}")
        return WorkerAway(f"{self.where} is lost")


def _sent(value: Any) -> Any:
    """A file is sent by its content."""
    if isinstance(value, Path) and value.is_file():
        return FileContent(value.name, value.read_bytes())
    return value


def _kill(actor: Any) -> None:
    import ray

    with suppress(Exception):  # it may be dead, or the cluster be gone
        ray.kill(actor)
