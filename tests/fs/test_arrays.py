"""Numpy's files, read in several threads."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.fs.arrays import map_array, read_arrays


def test_one_thread_reads_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, content = np.arange(6, dtype=np.float32).reshape(2, 3), io.BytesIO()
    np.save(tmp_path / "a.npy", array)
    np.savez(content, a=array)
    at_work, load = threading.Lock(), np.load

    def slow(*args: Any, **options: Any) -> Any:
        assert at_work.acquire(blocking=False), "two threads read at the same time"
        time.sleep(0.005)
        at_work.release()
        return load(*args, **options)

    monkeypatch.setattr(np, "load", slow)

    def read(_: int) -> None:
        np.testing.assert_array_equal(map_array(tmp_path / "a.npy"), array)
        np.testing.assert_array_equal(read_arrays(io.BytesIO(content.getvalue()))["a"], array)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(8)))
