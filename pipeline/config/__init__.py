"""The configuration: a YAML file, checked once at the edge, then immutable values.

Unknown and ill-typed keys are refused with the file, the key path and what is allowed. The
meaning of each field is written beside it in config/default.yaml.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)

from pipeline.config import errors as config_errors
from pipeline.config.sweeps import Duration, Expand
from pipeline.engines import cards
from pipeline.engines.base import EngineSection
from pipeline.errors import ConfigError
from pipeline.fs.files import SCHEMES, bucket_path

FOR_ANCHORS = ("x-", ".")  # how top-level keys begin that are ignored: they hold anchors for merge keys


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


def _check_place(text: str) -> str:
    path = bucket_path(text)
    if path is None and re.match(r"[A-Za-z][\w+.-]*://", text):
        raise ValueError(f"is a folder, or {', '.join(f'{scheme}://bucket/prefix' for scheme in SCHEMES)}")
    if path is not None and ".." in path.parts:
        raise ValueError("can't have .. in it")
    return text


def _check_local(text: str) -> str:
    if "://" in text:
        raise ValueError("is always a folder on a disk of this machine")
    return text


Place = Annotated[PathText, AfterValidator(_check_place)]


class Folders(Section):
    inbox: Place = "inbox"
    outbox: Place = "outbox"
    state: Annotated[PathText, AfterValidator(_check_local)] = "state"


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
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = (
        "*.txt", "*.md", "*.nfo", "*.log", "*.cue", "*.m3u", "*.m3u8", "*.pls", "*.pdf",
        "*.jpg", "*.jpeg", "*.png", "*.gif", "*.webp", "Thumbs.db", "desktop.ini",
        "*.asd", "*.reapeaks", "*.pkf", "*.pek", "*.sfk",
    )  # fmt: skip


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
    variations: bool = True


class Judge(StageSettings):
    engine: str = "none"


def _rising(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise ValueError("must have the lower end first")
    return band


Share = Annotated[float, Field(ge=0, le=1)]
KEEP = r"best ([1-9]\d{0,2}) of ([1-9]\d{0,2})"
Band = Annotated[tuple[Share, Share], Field(strict=False), AfterValidator(_rising)]


class EntryGates(Section):
    """The checks that the results of one entry must pass; None: as `gates` says for all."""

    similarity: Band | None = None
    same_tempo: bool | None = None
    same_key: bool | None = None
    max_silence: Share | None = None
    max_copied: Share | None = None
    max_shared: Share | None = None


class Gates(EntryGates):
    """The checks that every result must pass, and what becomes of one that fails; None: no such check."""

    same_tempo: bool | None = False
    same_key: bool | None = False
    max_silence: Share | None = 0.5
    max_shared: Share | None = 0.5
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    rejected: Literal["delete", "keep"] = "delete"

    def of(self, entry: EntryGates) -> Gates:
        """These, with what an entry says for itself."""
        return self.model_copy(update={name: value for name, value in entry if value is not None})


class VariationSpec(BaseModel):
    """One entry of `generate.variations`.

    The extra fields are the parameters, shared or of an engine, and the engines' sections: see `sweeps`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    name: Annotated[
        str, Field(min_length=1, max_length=60, pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$")
    ]
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    expand: Expand = "grid"
    keep: Annotated[str, Field(pattern=f"^{KEEP}$")] | None = None
    gates: EntryGates = EntryGates.model_construct()

    @property
    def best_of(self) -> tuple[int, int]:
        """How many results are kept of how many takes."""
        found = re.fullmatch(KEEP, self.keep or "")
        return (int(found[1]), int(found[2])) if found else (1, 1)


class Generate(StageSettings):
    duration_s: Duration = 30.0
    batch_tracks: Annotated[int, Field(ge=1, le=64)] = 8
    variations: Annotated[tuple[VariationSpec, ...], Field(min_length=1, strict=False)] = (
        VariationSpec.model_construct(name="faithful", similarity=0.6, count=2),
        VariationSpec.model_construct(name="bold", similarity=[0.4, 0.2]),
    )


def _with_engine_sections(model: type[StageSettings], stage: str) -> type[StageSettings]:
    """A stage's model with a field for the section of each engine that declares one."""
    fields: dict[str, Any] = {
        card.name: (card.section, card.section.model_construct())
        for card in cards().values()
        if card.stage == stage and card.section
    }
    return create_model(model.__name__, __base__=model, **fields)


if not TYPE_CHECKING:
    Embed = _with_engine_sections(Embed, "embed")
    Generate = _with_engine_sections(Generate, "generate")
    Judge = _with_engine_sections(Judge, "judge")


class Output(Section):
    format: Literal["wav", "flac", "mp3", "opus"] = "wav"
    sample_rate: Annotated[int, Field(ge=8000, le=192000)] | None = None
    bit_depth: Literal[16, 24, "float"] = 24
    loudness_lufs: Annotated[float, Field(ge=-70, le=0)] | Literal["source"] = -14.0
    album: bool = False
    true_peak_dbtp: Annotated[float, Field(ge=-20, le=0)] = -1.0
    limiter: bool = False
    length: Literal["exact", "bars"] = "exact"
    loop: bool = False
    fade_in_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    fade_out_s: Annotated[float, Field(ge=0, le=60)] = 0.0


class WorkerResources(Section):
    """What one worker takes of a Ray node; None: see config/default.yaml."""

    cpu: Annotated[float, Field(gt=0)] | None = None
    gpu: Annotated[float, Field(ge=0)] | None = None


class Executor(Section):
    kind: Literal["process", "inline", "ray"] = "process"
    workers: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto"
    idle_s: Annotated[float, Field(ge=0)] = 600.0
    address: Annotated[str, Field(pattern=r"^(auto|[^\s:/]+:\d{1,5})$")] = "auto"
    resources_per_worker: WorkerResources = WorkerResources.model_construct()


def _executor_section(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class GallerySettings(Section):
    enabled: bool = True


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


class Log(Section):
    format: Literal["auto", "text", "json"] = "auto"


class Metrics(Section):
    textfile: PathText | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class Config(Section):
    """The whole configuration."""

    # model_construct: validating the defaults would build each section's schema at import.
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    executor: Annotated[Executor, BeforeValidator(_executor_section)] = Executor.model_construct()
    folders: Folders = Folders.model_construct()
    intake: Intake = Intake.model_construct()
    normalize: Normalize = Normalize.model_construct()
    embed: Embed = Embed.model_construct()
    generate: Generate = Generate.model_construct()
    gates: Gates = Gates.model_construct()
    judge: Judge = Judge.model_construct()
    output: Output = Output.model_construct()
    gallery: GallerySettings = GallerySettings.model_construct()
    retry: Retry = Retry.model_construct()
    disk: Disk = Disk.model_construct()
    retention: Retention = Retention.model_construct()
    log: Log = Log.model_construct()
    metrics: Metrics = Metrics.model_construct()

    def canonical(self) -> str:
        """The effective configuration as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def load_config(
    path: Path | None, *, preset: Path | None = None, env: Mapping[str, str] = os.environ
) -> Config:
    """Read and check a configuration; None is the built-in default.

    The settings of a preset, another such file, win over it; lists are replaced. `DEVICE` in `env` wins over
    both.

    Raises:
        ConfigError: with one line per problem.
    """
    where = "the built-in configuration" if path is None else str(path)
    raw = {} if path is None else _read(path)
    if preset is not None:
        where, raw = f"{where} with {preset}", _merged(raw, _read(preset))
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
    engines = {"embed": config.embed.engine, "generate": config.generate.engine, "judge": config.judge.engine}
    problems = config_errors.of_engines(engines, config.generate.variations)
    problems += config_errors.of_executor(config.executor, config.device)
    problems += config_errors.of_normalize(config.normalize)
    if problems := [*problems, *config_errors.of_output(config.output)]:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key; of anything else, what stands above."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _read(path: Path) -> dict[str, Any]:
    """The file's keys, without those at the top level that only hold YAML anchors.

    Raises:
        ConfigError: it can't be read, or is not a YAML mapping.
    """
    try:
        raw = yaml.load(path.read_bytes(), _Loader)
    except OSError as e:
        raise ConfigError(f"{path}: can't be read: {e.strerror}") from e
    except yaml.MarkedYAMLError as e:
        raise ConfigError(f"{path}: {config_errors.of_yaml(e)}") from e
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # ValueError: such as "!!int x"
        raise ConfigError(f"{path}: can't be read as YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: must be a mapping of keys, not {config_errors.shown(raw)}")
    return {key: value for key, value in (raw or {}).items() if not str(key).startswith(FOR_ANCHORS)}


class _Loader(yaml.SafeLoader):
    """YAML with merge keys, without duplicate keys, and without the octal numbers of YAML 1.1."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            problem = f"{node.value} would be read as an octal number: write it without the leading zero"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(super().construct_yaml_int(node))

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
