"""All vectors as a file for other programs: Parquet, or a numpy array with a CSV file beside it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, MissingPackage
from pipeline.fs.atomic import replacing
from pipeline.records import Samples

ENDINGS = (".parquet", ".npy")
COLUMNS = ("name", "variation", "track", "file")  # of text, beside the vectors
INSTALL_COMMAND = "pip install -r requirements-search.txt"


def check_target(path: Path) -> None:
    """Check that vectors can be written to a file of that name.

    Raises:
        ConfigError: its ending is not among ENDINGS.
        MissingPackage: the ending needs pyarrow.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path.name} must end in {' or '.join(ENDINGS)}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingPackage(f"Parquet needs pyarrow: {INSTALL_COMMAND}; .npy needs nothing")


def export(
    path: Path, matrix: Samples, about: Sequence[Mapping[str, Any]], engine: Mapping[str, str]
) -> list[Path]:
    """Write vectors, (n, d), and what each is of (COLUMNS); returns the files.

    Parquet has both in one file, the vectors as lists of float32 in the column `vector`, and `engine` in its
    metadata. Beside x.npy, x.csv has a line for each row of the array, after the names of its columns.

    Raises:
        ConfigError, MissingPackage: see `check_target`.
        OSError: it can't be written.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.part")
    if path.suffix == ".parquet":
        with replacing(path, temporary):
            _write_parquet(temporary, matrix, about, engine)
        return [path]
    with replacing(path, temporary), temporary.open("wb") as array:
        np.save(array, matrix)
    names = path.with_suffix(".csv")
    with replacing(names, temporary), temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(about)
    return [path, names]


def _write_parquet(
    path: Path, matrix: Samples, about: Sequence[Mapping[str, Any]], engine: Mapping[str, str]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: pa.array([one[name] for one in about], pa.string()) for name in COLUMNS}
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1), pa.float32())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(values, matrix.shape[1])
    parquet.write_table(pa.table(columns).replace_schema_metadata(dict(engine)), path)
