"""The configuration: a YAML file, checked once at the edge, then immutable values.

Unknown and ill-typed keys are refused with the file, the key path and what is allowed. The
meaning of each field is written beside it in config/default.yaml.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import config_errors
from pipeline.engines import cards
from pipeline.engines.base import EngineSection
from pipeline.errors import ConfigError

MAX_VALUES = 100_000  # in a file, with its aliases expanded
FOR_ANCHORS = ("x-", ".")  # how top-level keys begin that are ignored: they hold anchors for merge keys

Duration = Annotated[float, Field(ge=0.1, le=3600)] | Literal["source"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def _home_is_known(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError as e:
        raise PydanticCustomError("unknown_user", "names a user that this machine does not have") from e
    return path


PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(_home_is_known)]


class Folders(Section):
    inbox: PathText = "inbox"
    outbox: PathText = "outbox"
    state: PathText = "state"


class Intake(Section):
    after: Literal["move", "delete", "keep"] = "move"
    settle_s: Annotated[float, Field(ge=0, le=3600)] = 2.0
    rescan_s: Annotated[float, Field(gt=0, le=86400)] = 30.0
    watch: Literal["auto", "events", "polling"] = "auto"
    poll_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    marker: Annotated[str, Field(pattern=r"^\.[^/\x00-\x1f\x7f]+$")] | None = None
    subfolders: Literal["flatten", "keep"] = "flatten"
    follow_symlinks: bool = False
    spool_gb: Annotated[float, Field(gt=0)] = 10.0
    ignore: tuple[str, ...] = (
        "*.txt", "*.md", "*.nfo", "*.log", "*.cue", "*.m3u", "*.m3u8", "*.pls", "*.pdf",
        "*.jpg", "*.jpeg", "*.png", "*.gif", "*.webp", "Thumbs.db", "desktop.ini",
        "*.asd", "*.reapeaks", "*.pkf", "*.pek", "*.sfk",
    )  # fmt: skip

    @field_validator("ignore", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Normalize(Section):
    sample_rate: Annotated[int, Field(ge=8000, le=192000)] = 44100
    loudness_lufs: Annotated[float, Field(ge=-70, le=0)] = -14.0
    true_peak_dbtp: Annotated[float, Field(ge=-20, le=0)] = -1.0
    trim_silence: bool = True
    trim_below_dbfs: Annotated[float, Field(ge=-120, le=-20)] = -60.0
    min_duration_s: Annotated[float, Field(ge=0.1, le=60)] = 1.0
    max_duration_s: Annotated[float, Field(gt=0, le=36000)] = 1200.0
    max_size_mb: Annotated[float, Field(gt=0)] = 1000.0
    accept_truncated: bool = False


class StageSettings(Section):
    """The settings of each stage, beside the sections of its engines: see `_with_engine_sections`."""

    engine: str = "auto"
    model: PathText | None = None
    revision: str | None = None

    @property
    def sections(self) -> dict[str, EngineSection]:
        """The engines' own sections, by engine."""
        return {name: value for name, value in self if isinstance(value, EngineSection)}


class Embed(StageSettings):
    pass


class VariationSpec(BaseModel):
    """One entry of `generate.variations`; the engine's own parameters are the extra fields."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    name: Annotated[
        str, Field(min_length=1, max_length=60, pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$")
    ]
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    duration_s: Duration | None = None


class Generate(StageSettings):
    duration_s: Duration = 30.0
    batch_tracks: Annotated[int, Field(ge=1, le=64)] = 8
    variations: Annotated[tuple[VariationSpec, ...], Field(min_length=1)] = (
        VariationSpec.model_construct(name="faithful", temperature=0.6, count=2),
        VariationSpec.model_construct(name="bold", temperature=[1.0, 1.2]),
    )

    @field_validator("variations", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


def _with_engine_sections(model: type[StageSettings], stage: str) -> type[StageSettings]:
    """A stage's model with a field for the section of each engine that declares one."""
    sections = {card.name: card.section for card in cards().values() if card.stage == stage and card.section}
    fields: dict[str, Any] = {
        name: (section, section.model_construct()) for name, section in sections.items()
    }
    return create_model(model.__name__, __base__=model, **fields)


if not TYPE_CHECKING:
    Embed = _with_engine_sections(Embed, "embed")
    Generate = _with_engine_sections(Generate, "generate")


class Output(Section):
    bit_depth: Literal[16, 24, "float"] = 24
    loudness_lufs: Annotated[float, Field(ge=-70, le=0)] = -14.0
    true_peak_dbtp: Annotated[float, Field(ge=-20, le=0)] = -1.0


class Retry(Section):
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    backoff_s: Annotated[float, Field(ge=0, le=86400)] = 10.0
    max_backoff_s: Annotated[float, Field(ge=0, le=604800)] = 3600.0


class Disk(Section):
    min_free_mb: Annotated[float, Field(ge=0)] = 50.0


Days = Annotated[float, Field(ge=0)] | None
Gigabytes = Annotated[float, Field(ge=0)] | None


class Retention(Section):
    """Limits beyond which `gc` removes files; None: no limit."""

    work_days: Days = 7.0
    archive_days: Days = None
    archive_gb: Gigabytes = None
    outbox_days: Days = None
    outbox_gb: Gigabytes = None
    redo_missing: bool = True


class Config(Section):
    """The whole configuration."""

    # model_construct: validating the defaults would build each section's schema at import.
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    folders: Folders = Folders.model_construct()
    intake: Intake = Intake.model_construct()
    normalize: Normalize = Normalize.model_construct()
    embed: Embed = Embed.model_construct()
    generate: Generate = Generate.model_construct()
    output: Output = Output.model_construct()
    retry: Retry = Retry.model_construct()
    disk: Disk = Disk.model_construct()
    retention: Retention = Retention.model_construct()

    def canonical(self) -> str:
        """The effective configuration as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def load_config(path: Path | None, *, env: Mapping[str, str] = os.environ) -> Config:
    """Read and check a configuration; None is the built-in default. `DEVICE` in `env` wins.

    Raises:
        ConfigError: with one line per problem.
    """
    where = "the built-in configuration" if path is None else str(path)
    raw = {} if path is None else _read(path)
    if device := env.get("DEVICE"):
        raw = {**raw, "device": device}
    try:
        config = Config.model_validate(raw)
    except ValidationError as e:
        problems = config_errors.of_validation(e, Config)
        if device:
            problems = [
                f"{problem} (from the variable DEVICE)" if problem.startswith("device:") else problem
                for problem in problems
            ]
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems)) from e
    if problems := config_errors.of_engines(
        {"embed": config.embed.engine, "generate": config.generate.engine},
        variations=[spec.model_extra or {} for spec in config.generate.variations],
        own_keys=set(VariationSpec.model_fields),
    ):
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def _read(path: Path) -> dict[str, Any]:
    """The file's keys, without those at the top level that only hold YAML anchors.

    Raises:
        ConfigError: it can't be read, or is not a YAML mapping.
    """
    try:
        raw = _parsed(path.read_bytes())
    except OSError as e:
        raise ConfigError(f"{path}: can't be read: {e.strerror}") from e
    except RecursionError as e:
        raise ConfigError(f"{path}: is nested too deeply") from e
    except yaml.reader.ReaderError as e:
        raise ConfigError(f"{path}: is not UTF-8 text: {e.reason} (position {e.position})") from e
    except yaml.MarkedYAMLError as e:
        raise ConfigError(f"{path}: {config_errors.of_yaml(e)}") from e
    except ValueError as e:  # such as "!!int x", or a number of thousands of digits
        raise ConfigError(f"{path}: has a number that can't be read: {e}") from e
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: must be a mapping of keys, not {config_errors.shown(raw)}")
    return {key: value for key, value in (raw or {}).items() if not str(key).startswith(FOR_ANCHORS)}


def _parsed(data: bytes) -> Any:
    loader = _Loader(data)
    node = loader.get_single_node()
    if _size(node, {}) > MAX_VALUES:
        problem = f"aliases expand to more than {MAX_VALUES} values, or contain themselves"
        raise yaml.MarkedYAMLError(problem=problem)
    return None if node is None else loader.construct_document(node)


def _size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """The number of values in a node with its aliases expanded, by `id`; a cycle counts as too many."""
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES + 1
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = itertools.chain.from_iterable(children)
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


class _Loader(yaml.SafeLoader):
    """YAML with merge keys, without duplicate keys, and with the numbers of YAML 1.2.

    PyYAML follows YAML 1.1, where 0123 is 83, 1:30 is 90, 1e3 is text and 2024-01-01 is a date. Its
    yes, no, on and off and its 1_000 stay.
    """

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Insert the pairs of merge keys, which may repeat keys, once the node's own keys are checked."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and keys[key.value] > 1:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        super().flatten_mapping(node)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        return int(text, 0 if text.lstrip("+-")[1:2].isalpha() else 10)


_INTEGER = re.compile(r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|\d[\d_]*)$")
_FLOAT = re.compile(
    r"[-+]?((\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag != "tag:yaml.org,2002:timestamp"
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
