"""Work shared between threads.

A step of the decoder is hundreds of short phases, each of which needs the results of the one before.
All threads run through all phases and take tasks while there are any; a phase is over when its tasks
are done, whoever did them. So nobody waits for a thread that the system has suspended: with one barrier
per phase, a step was a hundred times slower on a machine that others use as well. Compiled functions
release the interpreter's lock, so the threads are Python's own.
"""

from __future__ import annotations

from numba import njit, types

from pipeline.engines.musicgen.kernels.intrinsics import add_atomically
from pipeline.engines.musicgen.kernels.processor import OPTIONS

COUNTERS = 2  # per phase: tasks taken, tasks done
_SPINS = 2000  # before the processor is offered to other threads

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@njit(**OPTIONS)
def tasks(counters, phase, count):
    """Yield the numbers of the tasks that this thread takes; ends when all `count` tasks are done.

    With each comes the number of the task that this thread takes next, for which it can prefetch memory;
    after the last one it is `count` or more.
    """
    task = add_atomically(counters, COUNTERS * phase, 1)
    while task < count:
        following = add_atomically(counters, COUNTERS * phase, 1)
        yield task, following
        add_atomically(counters, COUNTERS * phase + 1, 1)
        task = following
    spins = 0
    while add_atomically(counters, COUNTERS * phase + 1, 0) < count:
        spins += 1
        if spins > _SPINS:
            _sched_yield()
