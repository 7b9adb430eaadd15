"""The file with ratings that the gallery's pages make."""

from __future__ import annotations

from codecs import BOM_UTF8
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import errors as config_errors
from pipeline.errors import ConfigError, os_reason
from pipeline.fs.names import printable
from pipeline.store.schema import Rating

LISTED = 5  # problems of a file that are named

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    """One rating. Other keys are left for newer pages."""

    model_config = ConfigDict(strict=True, frozen=True)

    track: Sha256  # of the source
    file: str  # below the track's folder
    sha256: Sha256  # of the file
    stars: Annotated[int, Field(ge=1, le=5)] | None
    kept: bool | None
    note: Annotated[str, Field(max_length=10_000)] = ""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    version: Literal[1] = Field(alias="schema")
    ratings: list[_Entry]


def read_ratings(path: Path) -> list[Rating]:
    """The ratings of a file, in its order.

    Raises:
        ConfigError: it can't be read, or is not as it should be; with one line per problem.
    """
    shown = printable(path)
    try:
        found = _File.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8))  # of some editors
    except OSError as e:
        raise ConfigError(f"{shown} can't be read: {os_reason(e)}") from e
    except ValidationError as e:
        if e.errors()[0]["type"] == "json_invalid":
            raise ConfigError(f"{shown} is not JSON: {e.errors()[0]['ctx']['error']}") from e
        problems = config_errors.of_validation(e, _File)
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        lines = "\n".join(f"{shown}: {problem}" for problem in [*problems[:LISTED], *more])
        raise ConfigError(f"{lines}\n{shown}: a file of ratings is what the gallery's pages download") from e
    return [Rating(**entry.model_dump()) for entry in found.ratings]
