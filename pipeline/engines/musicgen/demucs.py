"""A track without drums and bass: the stems "vocals" and "other" of demucs.

The model is htdemucs of the package demucs (Rouard, Massa and Défossez 2022, arXiv:2211.08553), if the
package is installed and the weights are on this machine. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audio import resample
from pipeline.engines.base import StopFn, check_stop
from pipeline.engines.musicgen.hpss import cut
from pipeline.engines.pretrained import first_line
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights
from pipeline.records import Audio, Samples

log = logging.getLogger("pipeline")

DEMUCS_VERSION = "4.0.1"
INSTALL_COMMAND = f"pip install demucs=={DEMUCS_VERSION}"
DEMUCS_CLASS = "demucs.htdemucs.HTDemucs"
SIGNATURE = "955717e8"  # names the files of htdemucs' one model
HUB_ID = "adefossez/HTDemucs"
FETCH_COMMAND = f"hf download {HUB_ID} {SIGNATURE}.safetensors"
KEPT_STEMS = ("vocals", "other")
SEGMENT_STRIDE = 0.75  # of a segment; demucs' own default


@dataclass(frozen=True, eq=False)
class Separator:
    """An open HTDemucs."""

    model: Any
    device: str
    sample_rate: int  # Hz
    channels: int
    segment: int  # samples per call
    kept: list[int]  # indices of the stems that are used


def without_rhythm(audio: Audio, separator: Separator, should_stop: StopFn) -> Audio:
    """The sum of the stems without drums and bass, in one channel.

    As demucs' `apply_model` without its random shifts: segments that overlap by a quarter, with
    triangular weights. That function holds all stems of the whole track in memory and can't be stopped.
    """
    import torch

    source = Audio(audio.mono_channels, audio.sample_rate)
    sound = _channels(resample(source, separator.sample_rate).samples, separator.channels)
    length, stride = separator.segment, int(SEGMENT_STRIDE * separator.segment)
    rise = np.arange(1, length // 2 + 1, dtype=np.float32)
    weight = np.concatenate([rise, np.arange(length - length // 2, 0, -1, dtype=np.float32)])
    total = np.zeros(sound.shape[1], np.float32)
    weights = np.zeros_like(total)
    for start in range(0, sound.shape[1], stride):
        check_stop(should_stop, "musicgen")
        n = min(length, sound.shape[1] - start)
        before = (
            length - n
        ) // 2  # a short segment is extended on both sides, by zeros where there is no sound
        piece = torch.from_numpy(cut(sound, start - before, length)).to(separator.device)
        with torch.inference_mode():
            stems = separator.model(piece[None])[0]
            melody = stems[separator.kept].sum(dim=0).mean(dim=0).to("cpu", torch.float32).numpy()
        total[start : start + n] += weight[:n] * melody[before : before + n]
        weights[start : start + n] += weight[:n]
    separated = resample(Audio((total / weights)[None], separator.sample_rate), audio.sample_rate)
    return Audio(cut(separated.samples, 0, audio.n_samples), audio.sample_rate)


def _channels(samples: Samples, channels: int) -> Samples:
    """The channels that the model takes; if their number differs, each is the mean of the given ones."""
    if samples.shape[0] == channels:
        return samples
    return np.broadcast_to(samples.mean(axis=0, dtype=np.float32), (channels, samples.shape[1]))


def separator_if_any(device: str) -> Separator | None:
    """demucs, if it can be used. Weights that are present but can't be used are logged."""
    try:
        return open_separator(device)
    except BadCheckpoint as error:
        log.warning("%s The melody is taken without demucs.", error)
    except (MissingPackage, MissingWeights):
        pass
    return None


def find() -> Path:
    """The file of demucs' weights, which is not opened; torch and demucs are not imported.

    Raises:
        MissingPackage: demucs is not installed.
        MissingWeights: its weights are not on this machine.
    """
    if find_spec("demucs") is None:
        raise _missing("demucs")
    path = _find_weights()
    if path is None:
        raise MissingWeights(
            f"melody: demucs needs the weights of htdemucs, which aren't on this machine: {FETCH_COMMAND}."
        )
    return path


def open_separator(device: str) -> Separator:
    """Open htdemucs from this machine. No code of its files is run.

    Raises:
        MissingPackage, MissingWeights: as `find`.
        BadCheckpoint: the weights can't be used.
    """
    path = find()
    model_class = _model_class()
    try:
        args, kwargs, state = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
        model = model_class(*args, **kwargs)
        model.load_state_dict(state)
        kept = [model.sources.index(name) for name in KEPT_STEMS]
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file the libraries raise any error
        raise BadCheckpoint(
            f"{path} can't be used ({first_line(error)}): delete it and run {FETCH_COMMAND}."
        ) from error
    return Separator(
        model=model.eval().to(device),
        device=device,
        sample_rate=int(model.samplerate),
        channels=int(model.audio_channels),
        segment=int(model.segment * model.samplerate),
        kept=kept,
    )


def _model_class() -> Any:
    try:
        return importlib.import_module("demucs.htdemucs").HTDemucs
    except ImportError as error:
        raise _missing(error.name or "demucs") from error


def _missing(package: str) -> MissingPackage:
    return MissingPackage(f"melody: demucs needs {package}: {INSTALL_COMMAND}.")


def _find_weights() -> Path | None:
    """The safetensors of demucs 4.1 in the hub's cache, else the pickle of demucs 4.0 in torch's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo = Path(HF_HUB_CACHE) / f"models--{HUB_ID.replace('/', '--')}"
    places = [(repo / "snapshots", f"*/{SIGNATURE}.safetensors")]
    places.append((_torch_cache() / "checkpoints", f"{SIGNATURE}-*.th"))
    found = [path for folder, pattern in places for path in sorted(folder.glob(pattern)) if path.is_file()]
    return found[0] if found else None


def _torch_cache() -> Path:
    """As torch.hub.get_dir(), without importing torch, which takes seconds."""
    caches = os.getenv("XDG_CACHE_HOME", "~/.cache")
    return Path(os.getenv("TORCH_HOME", f"{caches}/torch")).expanduser() / "hub"


Package = tuple[list[Any], dict[str, Any], dict[str, Any]]  # arguments of HTDemucs, and its state


def _read_safetensors(path: Path) -> Package:
    """The format of `adefossez/HTDemucs`: the arguments are JSON in the file's metadata."""
    from safetensors import safe_open

    def decode(value: dict[str, Any]) -> Any:
        if value.get("_type") == "fraction":
            return Fraction(value["numerator"], value["denominator"])
        return value

    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it isn't a dict
    if about.get("klass") != DEMUCS_CLASS:
        raise ValueError(f"it holds a {about.get('klass')}")
    args, kwargs = (json.loads(about[key], object_hook=decode) for key in ("args", "kwargs"))
    return args, kwargs, state


def _read_pickle(path: Path) -> Package:
    """The format of demucs 4.0, a pickle.

    It is opened by torch's restricted unpickler, which allows, beside tensors and plain values, only
    the class, its segment's Fraction, and numpy's numbers (in the record of the training). The file's
    name ends in the start of its SHA-256, which detects a broken download but not a forgery.
    """
    import torch

    model_class = _model_class()
    content = path.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(path.stem.partition("-")[2]):
        raise ValueError("its checksum isn't the one in its name")
    scalar = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
    ]
    numbers += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    with torch.serialization.safe_globals([model_class, Fraction, *numbers]):
        package = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if package["klass"] is not model_class:
        raise ValueError(f"it holds a {package['klass']}")
    return list(package["args"]), dict(package["kwargs"]), dict(package["state"])
