"""Numpy's files: read in several threads, and written to disks that may be full.

numpy parses the header of each array with `ast`. In Python 3.11, before 3.11.8, that could raise SystemError
while another thread did the same (python/cpython#106905). So one thread reads at a time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

_READING = threading.Lock()


def map_array(path: Path) -> NDArray[Any]:
    """The array of an .npy file, mapped into memory and read-only. Raises as `numpy.load`."""
    import numpy as np

    with _READING:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped


def write_array(file: IO[bytes], array: NDArray[Any]) -> None:
    """Write an array in the .npy format. numpy's own writing to a real file does not report why it failed."""
    import numpy as np

    np.save(SimpleNamespace(write=file.write), array)


def read_arrays(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file, by name. Raises as `numpy.load`."""
    import numpy as np

    with _READING, np.load(file, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}
