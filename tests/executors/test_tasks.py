"""Tasks of engines whose GPU is lost: they raise, so that the process is replaced."""

from __future__ import annotations

import numpy as np
import pytest
from runner_setup import StubEngines, StubGenerator, StubJudge, noise

from pipeline.config import Gates, Output
from pipeline.executors import tasks
from pipeline.executors.base import Tools
from pipeline.executors.judge import Verdict
from pipeline.executors.tasks import TakeRequest
from pipeline.records import Audio, Failure, Variation, VariationRequest
from pipeline.stages import Finished

LOST = RuntimeError("CUDA error: an illegal memory access was encountered")
FULL = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def wanted() -> list[TakeRequest]:
    audio = Audio(np.zeros((2, 32000), np.float32), 32000)
    requests = [VariationRequest(name, "track", audio, 1.0, seed) for seed, name in enumerate("ab")]
    return [TakeRequest(one, "track", 1.0, -14.0, Gates()) for one in requests]


def tools(generator: StubGenerator, judge: StubJudge | None = None) -> Tools:
    return Tools(StubEngines(generator), judge or StubJudge(), lambda *_: None, lambda: False)


@pytest.mark.parametrize(("error", "is_raised"), [(LOST, True), (FULL, False)])
def test_a_request_that_failed_with_the_gpu_ends_the_task_and_another_one_is_its_result(
    error: Exception, is_raised: bool
) -> None:
    def answer(request: VariationRequest) -> Variation | Failure:
        return noise(request) if request.request_id == "a" else Failure("b", error)

    results = tasks.generate(tools(StubGenerator(answer)), wanted(), {})
    assert next(results)[0].request_id == "a"
    if is_raised:
        with pytest.raises(RuntimeError, match="CUDA error"):
            next(results)
    else:
        assert "out of memory" in str(next(results)[0].error)


@pytest.mark.parametrize(("error", "is_raised"), [(LOST, True), (FULL, False)])
def test_a_judge_that_lost_its_gpu_ends_the_task_and_another_error_is_of_the_take(
    error: Exception, is_raised: bool
) -> None:
    def fail(made: Finished, gates: Gates) -> Verdict:
        raise error

    results = tasks.make_takes(tools(StubGenerator(), StubJudge(verdict=fail)), wanted(), Output())
    if is_raised:
        with pytest.raises(RuntimeError, match="CUDA error"):
            next(results)
    else:
        assert [str(take.error) for take in results] == [str(error)] * 2
