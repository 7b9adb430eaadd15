"""A track without drums and bass: the stems "vocals" and "other" of demucs.

The model is htdemucs of the package demucs (Rouard, Massa and Défossez 2022, arXiv:2211.08553), if the
package is installed and the weights are on this machine. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audio import resample
from pipeline.engines.base import StopFn, check_stop
from pipeline.engines.pretrained import reading
from pipeline.errors import MissingPackage, MissingWeights
from pipeline.records import Audio, cut

INSTALL_COMMAND = "pip install demucs==4.0.1"
DEMUCS_CLASS = "demucs.htdemucs.HTDemucs"
SIGNATURE = "955717e8"  # names the files of htdemucs' one model
HUB_ID = "adefossez/HTDemucs"
FETCH_COMMAND = f"hf download {HUB_ID} {SIGNATURE}.safetensors"
KEPT_STEMS = ("vocals", "other")
PIECE_S = 120  # four stems of so much are in memory at once


def without_rhythm(audio: Audio, model: Any, device: str, should_stop: StopFn) -> Audio:
    """The sum of the stems without drums and bass, in one channel, by an open HTDemucs.

    Each piece of the track is separated by demucs' `apply_model` without its random shifts, which holds
    four stems in memory. It calls the model once per segment of 8 s.
    """
    import torch

    model.register_forward_pre_hook(lambda *_: check_stop(should_stop))
    source = resample(Audio(audio.mono_channels, audio.sample_rate), model.samplerate).samples
    stereo = np.broadcast_to(source, (model.audio_channels, source.shape[1]))
    kept = [model.sources.index(name) for name in KEPT_STEMS]
    melody = []
    for piece in torch.split(torch.tensor(stereo), PIECE_S * model.samplerate, dim=1):
        stems = _library().apply_model(model, piece[None], shifts=0, device=device)[0]
        melody.append(stems[kept].sum(dim=0).mean(dim=0, keepdim=True))
    separated = Audio(torch.cat(melody, dim=1).numpy(), model.samplerate)
    return Audio(cut(resample(separated, audio.sample_rate).samples, 0, audio.n_samples), audio.sample_rate)


def find() -> Path:
    """The file of demucs' weights; it is not opened, and neither torch nor demucs is imported.

    It is the safetensors of demucs 4.1 in the hub's cache, or the pickle of demucs 4.0 in torch's cache.

    Raises:
        MissingPackage: demucs is not installed.
        MissingWeights: its weights are not on this machine.
    """
    if find_spec("demucs") is None:
        raise _missing("demucs")
    from huggingface_hub.constants import HF_HUB_CACHE

    repo = Path(HF_HUB_CACHE) / f"models--{HUB_ID.replace('/', '--')}"
    # As torch.hub.get_dir(), without importing torch, which takes seconds.
    torch_home = os.getenv("TORCH_HOME", os.getenv("XDG_CACHE_HOME", "~/.cache") + "/torch")
    pickles = Path(torch_home).expanduser() / "hub" / "checkpoints"
    for folder, pattern in (repo, f"snapshots/*/{SIGNATURE}.safetensors"), (pickles, f"{SIGNATURE}-*.th"):
        for path in sorted(folder.glob(pattern)):
            return path
    raise MissingWeights(
        f"melody: demucs needs the weights of htdemucs, which aren't on this machine: {FETCH_COMMAND}."
    )


def open_model() -> Any:
    """demucs.htdemucs.HTDemucs from this machine. No code of its files is run.

    Raises:
        MissingPackage, MissingWeights: as `find`.
        BadCheckpoint: the weights can't be used.
    """
    path = find()
    model_class = _library().HTDemucs
    with reading(path, f": delete it and run {FETCH_COMMAND}"):
        args, kwargs, state = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
        model = model_class(*args, **kwargs)
        model.load_state_dict(state)
    return model


def _library() -> Any:
    """The module demucs.apply, which has HTDemucs as well."""
    try:
        return importlib.import_module("demucs.apply")
    except ImportError as error:
        raise _missing(error.name or "demucs") from error


def _missing(package: str) -> MissingPackage:
    return MissingPackage(f"melody: demucs needs {package}: {INSTALL_COMMAND}.")


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

    model_class = _library().HTDemucs
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
