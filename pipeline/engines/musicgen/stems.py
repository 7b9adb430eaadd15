"""What the melody conditioning hears of a track: all of it, or what drums and bass leave.

MusicGen's chroma names the strongest pitch class of each moment, and the model learned it from
recordings without drums and bass: audiocraft separates them with demucs and keeps the stems
"vocals" and "other". Of the whole mix it often is the kick drum or the bass that is named. Music
that is melodic already is better left as it is (audiocraft #478).

- `mix`: the track as it is.
- `harmonic`: what is steady in time, above the bass. Spectrogram medians along time and along
  frequency say how much of each bin is tone and how much is stroke (Fitzgerald 2010,
  "Harmonic/percussive separation using median filtering": its soft mask); a high-pass takes the
  register of bass and kick drum, and does most of the work.
- `demucs`: "vocals" and "other" of the package's htdemucs (Rouard, Massa and Défossez 2022,
  arXiv:2211.08553).
- `auto`: `mix` where there are hardly any strokes (`percussive_share`), else `demucs` where it is
  installed with its weights on this machine, else `harmonic`.

What is heard only becomes chroma, which is of the channels' mean: both filters give one channel.
The same audio gives the same bits; with demucs, on the same machine and build of torch.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import math
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import resample
from pipeline.engines.base import StopFn
from pipeline.engines.pretrained import first_line
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights, Stopped
from pipeline.records import Audio, Samples
from pipeline.weights import hub_cache

log = logging.getLogger("pipeline")

Melody = Literal["auto", "mix", "harmonic", "demucs"]
Way = Literal["mix", "harmonic", "demucs"]

HOP_S = 0.0232  # 1024 samples at 44.1 kHz; frames are four of them long: 93 ms
OVERLAP = 4  # frames over every sample
TOP_HZ = 8000.0  # nothing above it is looked at or kept: a melody's pitch is below
BLOCK_FRAMES = 1024  # what is in memory at once: 24 s

TONE_S = 0.2  # medians along time: a tone of half this length still counts as steady
STROKE_HZ = 500.0  # medians along frequency
BASS_HZ, BASS_ORDER = 200.0, 8  # -6 dB there, 48 dB an octave below

EXCERPTS, EXCERPT_S = 6, 5.0  # what `auto` looks at of a longer track, evenly spread
LONG_TONE_S = 0.5  # medians along time for the decision: it must not miss a stroke, tones may suffer
FLOOR_HZ = 100.0  # above it, octaves count alike
SOUNDING = 1e-4  # -40 dB of the loudest frame: quieter ones say nothing
MELODIC = 0.085  # below this share of strokes there are no drums to speak of: see docs/musicgen.md

DEMUCS_VERSION = "4.0.1"
INSTALL_COMMAND = f"pip install demucs=={DEMUCS_VERSION}"
DEMUCS_CLASS = "demucs.htdemucs.HTDemucs"
SIGNATURE = "955717e8"  # of htdemucs' one model: the name of its files
HUB_ID = "adefossez/HTDemucs"
KEPT_STEMS = ("vocals", "other")
SEGMENT_STRIDE = 0.75  # of a segment; demucs' own default

Mags = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Heard:
    """What the chroma is made of."""

    audio: Audio  # of the track's length and rate; one channel unless it is the track itself
    how: Way
    percussive_share: float | None = None  # what `auto` decided by, in [0, 1]; None: not asked, or silence


def listen(
    audio: Audio,
    how: Melody,
    *,
    should_stop: StopFn,
    device: str = "cpu",
    cache_dir: Path | None = None,
) -> Heard:
    """The part of a track that its melody is taken from.

    `device` is demucs', `cache_dir` the hub's cache its weights may be in (None: the library's).

    Raises:
        Stopped: soon after `should_stop` turned true.
        MissingPackage, MissingWeights, BadCheckpoint: `how` is demucs, and it can't be used; `auto`
            does without it.
    """
    share, separator = None, None
    if how == "auto":
        how, share = "mix", percussive_share(audio)
        if share is not None and share >= MELODIC:
            separator = _separator_if_any(device, cache_dir)
            how = "demucs" if separator else "harmonic"
    elif how == "demucs":
        separator = _separator(device, cache_dir)
    heard = audio
    if separator:
        heard = _without_rhythm(audio, separator, should_stop)
    elif how == "harmonic":
        heard = harmonic(audio, should_stop)
    return Heard(heard, how, share)


# --- harmonic and percussive ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Hann frames over a track, each sample in `overlap` of them; the track begins in the last hop
    of frame 0."""

    sample_rate: int
    n_samples: int
    hop: int
    overlap: int

    @property
    def fft(self) -> int:
        return self.hop * self.overlap

    @property
    def n_frames(self) -> int:
        return math.ceil(self.n_samples / self.hop) + self.overlap - 1

    @property
    def bins_hz(self) -> Mags:
        """Those looked at: up to TOP_HZ."""
        n_bins = min(int(TOP_HZ * self.fft / self.sample_rate), self.fft // 2) + 1
        return np.arange(n_bins, dtype=np.float32) * (self.sample_rate / self.fft)

    @property
    def window(self) -> Mags:
        return np.hanning(self.fft + 1)[:-1].astype(np.float32)


def _grid(audio: Audio, overlap: int) -> _Grid:
    from scipy.fft import next_fast_len

    fft = next_fast_len(max(OVERLAP, round(HOP_S * audio.sample_rate)), real=True) * OVERLAP
    return _Grid(audio.sample_rate, audio.n_samples, fft // overlap, overlap)


def harmonic(audio: Audio, should_stop: StopFn) -> Audio:
    """Tones above the bass, in one channel.

    Blocks of frames are looked at with as many on either side as the medians reach: the result is
    that of the whole track at once. Memory: the result and some 50 MB.
    """
    import scipy.fft

    grid = _grid(audio, OVERLAP)
    reach = _odd(TONE_S * audio.sample_rate / grid.hop) // 2
    gain = _above_bass(grid.bins_hz)
    scale = grid.window / np.float32(0.375 * OVERLAP)  # 3/8: the mean of a squared Hann window
    out = np.zeros((grid.n_frames + OVERLAP - 1, grid.hop), np.float32)
    for first in range(0, grid.n_frames, BLOCK_FRAMES):
        _go_on(should_stop)
        last = min(first + BLOCK_FRAMES, grid.n_frames)
        start, end = max(0, first - reach), min(grid.n_frames, last + reach)
        spectra = _spectra(audio, grid, start, end)
        inner = slice(first - start, last - start)
        kept = spectra[inner] * (1 - _stroke_mask(np.abs(spectra), grid, TONE_S)[inner]) * gain
        frames = scipy.fft.irfft(kept, grid.fft, axis=1) * scale
        for k in range(OVERLAP):
            out[first + k : last + k] += frames[:, k * grid.hop : (k + 1) * grid.hop]
    begin = (OVERLAP - 1) * grid.hop
    return Audio(out.reshape(1, -1)[:, begin : begin + audio.n_samples], audio.sample_rate)


def percussive_share(audio: Audio) -> float | None:
    """How much of a usual moment is strokes, in [0, 1]; None if the track is silent.

    From six excerpts of 5 s, or all of what is shorter. Of an excerpt the mean over its sounding
    frames; of the track the upper quartile of its excerpts, as drums may pause for whole sections.
    """
    length = min(round(EXCERPT_S * audio.sample_rate), audio.n_samples)
    n_excerpts = min(EXCERPTS, audio.n_samples // max(1, length))
    starts = np.linspace(0, audio.n_samples - length, n_excerpts).astype(int)
    excerpts = [_frames(Audio(audio.samples[:, at : at + length], audio.sample_rate)) for at in starts]
    loudest = max((float(energy.max(initial=0.0)) for energy, _ in excerpts), default=0.0)
    shares = []
    for energy, strokes in excerpts:
        sounding = energy > SOUNDING * loudest
        if sounding.any():
            shares.append(strokes[:, sounding].mean(axis=1, dtype=np.float64).max())
    return float(np.percentile(shares, 75)) if shares else None


def _frames(excerpt: Audio) -> tuple[Mags, Mags]:
    """Of the frames wholly within: energy (frames,), and the share of strokes in it, (2, frames).

    Every octave counts alike (a kick drum has few bins, hats have many): all of them, then those
    above the bass, as a strong bass would hide the rest. It is the mean of the frames' shares, not
    of their energy, that tells drums from plucked strings: a pluck is loud, but short.
    """
    grid = _grid(excerpt, overlap=2)
    inside = grid.overlap - 1 if excerpt.n_samples > 4 * grid.fft else 0  # of a shorter one, all
    magnitudes = np.abs(_spectra(excerpt, grid, inside, grid.n_frames - inside))
    even = 1 / np.maximum(grid.bins_hz, FLOOR_HZ)
    weights = np.stack([even, even * _above_bass(grid.bins_hz)])
    energy = magnitudes.T**2
    strokes = weights @ (energy * _stroke_mask(magnitudes, grid, LONG_TONE_S).T)
    return energy.sum(axis=0), strokes / np.maximum(weights @ energy, np.finfo(np.float32).tiny)


def _spectra(audio: Audio, grid: _Grid, first: int, last: int) -> NDArray[np.complex64]:
    """Of frames first to last - 1 of the channels' mean, (frames, bins)."""
    import scipy.fft

    begin = (first - grid.overlap + 1) * grid.hop
    sound = _cut(audio.samples, begin, (last - first + grid.overlap - 1) * grid.hop).mean(axis=0)
    frames = np.lib.stride_tricks.sliding_window_view(sound, grid.fft)[:: grid.hop] * grid.window
    return np.asarray(scipy.fft.rfft(frames, axis=1)[:, : grid.bins_hz.size])


def _stroke_mask(magnitudes: Mags, grid: _Grid, tone_s: float) -> Mags:
    """How much of each bin is stroke rather than tone, [0, 1], (frames, bins)."""
    steady = _medians(magnitudes.T, _odd(tone_s * grid.sample_rate / grid.hop)).T
    broad = _medians(magnitudes, _odd(STROKE_HZ * grid.fft / grid.sample_rate))
    return np.asarray(broad**2 / np.maximum(broad**2 + steady**2, np.finfo(np.float32).tiny))


def _medians(values: Mags, size: int) -> Mags:
    """Running medians of odd length along the last axis; the ends are mirrored.

    The rows are filtered as one: for one dimension scipy has an algorithm several times as quick.
    """
    from scipy.ndimage import median_filter

    half = size // 2
    padded = np.pad(values, ((0, 0), (half, half)), mode="symmetric")
    return np.asarray(median_filter(padded.ravel(), size).reshape(padded.shape)[:, half : -half or None])


def _above_bass(bins_hz: Mags) -> Mags:
    """The squared magnitude of a Butterworth high-pass of half BASS_ORDER: as if run there and back."""
    return (1.0 / (1.0 + (BASS_HZ / np.maximum(bins_hz, 1.0)) ** BASS_ORDER)).astype(np.float32)


def _go_on(should_stop: StopFn) -> None:
    if should_stop():
        raise Stopped("musicgen was asked to stop.")


def _odd(length: float) -> int:
    """The odd number that is nearest, 3 at least."""
    return max(3, 2 * math.floor(length / 2) + 1)


def _cut(samples: Samples, begin: int, length: int) -> Samples:
    """`length` samples from `begin` on, a copy; zeros where there are none."""
    out = np.zeros((samples.shape[0], length), np.float32)
    first, last = max(0, begin), min(samples.shape[1], begin + length)
    if first < last:
        out[:, first - begin : last - begin] = samples[:, first:last]
    return out


# --- demucs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Separator:
    """An open HTDemucs."""

    model: Any
    device: str
    sample_rate: int  # Hz
    channels: int
    segment: int  # samples it takes at once
    kept: list[int]  # stems


def _without_rhythm(audio: Audio, separator: _Separator, should_stop: StopFn) -> Audio:
    """The stems that have no drums and no bass, summed, in one channel.

    demucs' `apply_model` without its random shifts: segments that overlap by a quarter, weighted by
    triangles. That function keeps all stems of the whole track in memory and can't be stopped.
    """
    import torch

    sound = _channels(resample(audio, separator.sample_rate).samples, separator.channels)
    length, stride = separator.segment, int(SEGMENT_STRIDE * separator.segment)
    rise = np.arange(1, length // 2 + 1, dtype=np.float32)
    weight = np.concatenate([rise, np.arange(length - length // 2, 0, -1, dtype=np.float32)])
    total = np.zeros(sound.shape[1], np.float32)
    weights = np.zeros_like(total)
    for start in range(0, sound.shape[1], stride):
        _go_on(should_stop)
        n = min(length, sound.shape[1] - start)
        before = (length - n) // 2  # what is short gets sound, or silence, on both sides
        piece = torch.from_numpy(_cut(sound, start - before, length)).to(separator.device)
        with torch.inference_mode():
            stems = separator.model(piece[None])[0]
            melody = stems[separator.kept].sum(dim=0).mean(dim=0).to("cpu", torch.float32).numpy()
        total[start : start + n] += weight[:n] * melody[before : before + n]
        weights[start : start + n] += weight[:n]
    heard = resample(Audio((total / weights)[None], separator.sample_rate), audio.sample_rate)
    return Audio(_cut(heard.samples, 0, audio.n_samples), audio.sample_rate)


def _channels(samples: Samples, channels: int) -> Samples:
    """As many channels as the model takes; if there are others, each is their mean."""
    if samples.shape[0] == channels:
        return samples
    return np.broadcast_to(samples.mean(axis=0, dtype=np.float32), (channels, samples.shape[1]))


def _separator_if_any(device: str, cache_dir: Path | None) -> _Separator | None:
    """demucs, if it can be used; that its weights are there but can't be used is worth a line."""
    try:
        return _separator(device, cache_dir)
    except BadCheckpoint as error:
        log.warning("%s The melody is found without demucs.", error)
    except (MissingPackage, MissingWeights):
        pass
    return None


def _separator(device: str, cache_dir: Path | None) -> _Separator:
    """Open htdemucs from this machine: nothing is downloaded, and no code of its files is run."""
    model_class = _model_class()
    path = _find_weights(cache_dir)
    if path is None:
        raise MissingWeights(
            f"melody: demucs needs the weights of htdemucs, which aren't on this machine: "
            f"{_fetch_command(cache_dir)}."
        )
    try:
        args, kwargs, state = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
        model = model_class(*args, **kwargs)
        model.load_state_dict(state)
        kept = [model.sources.index(name) for name in KEPT_STEMS]
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything
        raise BadCheckpoint(
            f"{path} can't be used ({first_line(error)}): delete it and run {_fetch_command(cache_dir)}."
        ) from error
    return _Separator(
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
        raise MissingPackage(f"melody: demucs needs {error.name or 'demucs'}: {INSTALL_COMMAND}.") from error


def _find_weights(cache_dir: Path | None) -> Path | None:
    """The hub's safetensors (demucs 4.1 brings them), else the pickle of demucs 4.0 in torch's cache."""
    from torch.hub import get_dir

    repo = hub_cache(cache_dir) / f"models--{HUB_ID.replace('/', '--')}"
    places = [(repo / "snapshots", f"*/{SIGNATURE}.safetensors")]
    places.append((Path(get_dir()) / "checkpoints", f"{SIGNATURE}-*.th"))
    found = [path for folder, pattern in places for path in sorted(folder.glob(pattern)) if path.is_file()]
    return found[0] if found else None


def _fetch_command(cache_dir: Path | None) -> str:
    where = f" --cache-dir {shlex.quote(str(cache_dir))}" if cache_dir else ""
    return f"hf download {HUB_ID} {SIGNATURE}.safetensors{where}"


Package = tuple[list[Any], dict[str, Any], dict[str, Any]]  # what HTDemucs is made with, and its state


def _read_safetensors(path: Path) -> Package:
    """The form of `adefossez/HTDemucs`: the arguments are JSON in the file's metadata."""
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
    """The form of demucs 4.0, a pickle.

    Opened by torch's restricted unpickler, with the class, its segment's Fraction and numpy's
    numbers (in the record of the training) allowed beside tensors and plain values. The file's name
    ends in the start of its SHA-256: that tells a broken download, not a forgery.
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
