"""The melody source of a track.

The music is synthesized, so that its melody is also known alone. Chroma is computed by transformers'
feature extractor with its defaults, which are those of the published checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import synth
from numpy.typing import NDArray
from tones import tones

from pipeline.engines.musicgen import demucs, hpss, melody
from pipeline.engines.musicgen.melody import Melody, melody_source
from pipeline.engines.musicgen.windows import STRIDE, windows
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights, Stopped
from pipeline.records import Audio, VariationRequest

Doubles = NDArray[np.float64]

RATE_HZ = 44100
TUNE = (69, 72, 76, 74, 71, 67, 72, 69)  # MIDI pitches, two to a second


def never() -> bool:
    return False


class MelodySource(NamedTuple):
    audio: Audio
    source: str


def source_of(audio: Audio, wanted: Melody) -> MelodySource:
    return MelodySource(*melody_source(audio, wanted, should_stop=never))


def share_of(audio: Audio) -> float:
    share = hpss.percussive_share(audio)
    assert share is not None
    return share


# --- music of known parts -----------------------------------------------------------------------------


def tune(seconds: float = 12.0) -> Doubles:
    """Plucked notes with five partials, A4 and about, RMS 0.1."""
    out = np.zeros(round(seconds * RATE_HZ))
    for k in range(int(seconds / 0.5)):
        pitch_hz = 440.0 * 2 ** ((TUNE[k % len(TUNE)] - 69) / 12)
        time_s = np.arange(round(0.5 * RATE_HZ)) / RATE_HZ
        partials = sum(np.sin(2 * np.pi * pitch_hz * n * time_s) / n**1.5 for n in range(1, 6))
        edges = np.minimum(1, time_s / 0.005) * np.minimum(1, (0.5 - time_s) / 0.02)
        out[k * time_s.size : (k + 1) * time_s.size] = np.asarray(partials) * np.exp(-time_s / 0.4) * edges
    return level(out, 0.1)


def bass(seconds: float = 12.0) -> Doubles:
    """D2 and G2 in turn, a second each, plucked every half second, RMS 0.1."""
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(np.where(time_s % 2 < 1, 73.4, 98.0)) / RATE_HZ
    return level(sum(np.sin(n * phase) / n**2 for n in (1, 2, 3)) * np.exp(-(time_s % 0.5) / 0.5), 0.1)


def drums(seconds: float = 12.0) -> Doubles:
    """Kick, snare, toms and hats at 120 bpm, in eighths, RMS 0.1."""
    rng = np.random.default_rng(5)
    time_s = np.arange(RATE_HZ // 4) / RATE_HZ
    decay = np.exp(-time_s / 0.08)
    kick, tom = (
        np.sin(2 * np.pi * (hz * time_s + 4 * (1 - np.exp(-time_s / 0.02)))) * decay for hz in (55.0, 110.0)
    )
    out = []
    for k in range(round(4 * seconds)):
        noise = rng.standard_normal(time_s.size)
        hats = np.diff(noise, prepend=0.0) * np.exp(-(time_s % 0.125) / 0.02)
        out.append(0.15 * hats + (kick, 0.3 * tom, 0.5 * noise * np.exp(-time_s / 0.05), kick)[k % 4])
    return level(np.concatenate(out), 0.1)


def level(sound: Any, rms: float) -> Doubles:
    return np.asarray(sound * (rms / np.sqrt(np.mean(np.square(sound)))))


def mixed(*parts: Any) -> Audio:
    """The sum of parts in stereo."""
    return Audio(np.tile(sum(parts), (2, 1)).astype(np.float32), RATE_HZ)


@pytest.fixture(scope="session")
def pitch_classes() -> Callable[[Audio], NDArray[np.int64]]:
    """The pitch class of each frame of chroma."""
    pytest.importorskip("torchaudio", reason="torchaudio is not in the core install")
    transformers = pytest.importorskip("transformers", reason="transformers is not in the core install")
    from pipeline.audio import resample

    extractor = transformers.MusicgenMelodyFeatureExtractor()

    def name(audio: Audio) -> NDArray[np.int64]:
        mono = resample(Audio(audio.mono()[None], audio.sample_rate), extractor.sampling_rate).samples[0]
        features = extractor(mono, sampling_rate=extractor.sampling_rate, return_tensors="np")
        return np.asarray(features["input_features"][0].argmax(axis=-1))

    return name


@pytest.fixture
def without_demucs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were not installed."""
    monkeypatch.setitem(sys.modules, "demucs", None)
    monkeypatch.setitem(sys.modules, "demucs.apply", None)


# --- harmonic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drum_level", "bass_level", "at_most"), [(8.0, 0.0, 0.75), (0.0, 2.0, 0.5), (4.0, 2.0, 0.5)]
)
def test_the_harmonic_part_keeps_the_melody_under_drums_and_bass(
    pitch_classes: Any, drum_level: float, bass_level: float, at_most: float
) -> None:
    """Reference: the chroma of the melody by itself. Levels are relative to it."""
    track = mixed(tune(), drum_level * drums(), bass_level * bass())
    expected = pitch_classes(mixed(tune()))
    assert np.mean(pitch_classes(track) == expected) < at_most
    assert np.mean(pitch_classes(source_of(track, "harmonic").audio) == expected) > 0.96


def test_the_harmonic_part_of_a_melody_alone_is_the_melody(pitch_classes: Any) -> None:
    expected = pitch_classes(mixed(tune()))
    assert np.mean(pitch_classes(source_of(mixed(tune()), "harmonic").audio) == expected) > 0.97


@pytest.mark.parametrize("sample_rate", [8000, 22050, 32000, 44100, 48000, 96000])
def test_length_rate_and_type_are_kept(sample_rate: int) -> None:
    audio = tones(440.0, 660.0, seconds=1.0137, sample_rate=sample_rate)
    found = source_of(audio, "harmonic")
    assert found.source == "harmonic"
    assert found.audio.sample_rate == sample_rate
    assert found.audio.samples.shape == (1, audio.n_samples)
    assert found.audio.samples.dtype == np.float32


def test_a_steady_tone_passes_as_it_is() -> None:
    """Reference: the tone through the high-pass, 1/(1 + (200/440)^8); 2 % of its level; no delay."""
    time_s = np.arange(2 * RATE_HZ) / RATE_HZ
    tone = 0.5 * np.sin(2 * np.pi * 440.0 * time_s)
    found = source_of(mixed(tone), "harmonic").audio.samples[0]
    middle = slice(RATE_HZ // 2, 3 * RATE_HZ // 2)
    gain = 1 / (1 + (hpss.BASS_HZ / 440.0) ** hpss.BASS_ORDER)
    np.testing.assert_allclose(found[middle], gain * tone[middle], atol=0.01)


@pytest.mark.long  # importing librosa compiles its functions
def test_the_mask_is_that_of_librosa() -> None:
    """Reference: librosa.decompose.hpss of the same magnitudes, and medians; 1e-5."""
    from librosa.decompose import hpss as librosa_hpss

    audio = mixed(tune(3.0), drums(3.0))
    grid = hpss._grid(audio, hpss.OVERLAP)
    magnitudes = np.abs(hpss._spectra(audio, grid, 0, grid.n_frames))
    mask = hpss._percussive_mask(magnitudes, grid, hpss.HARMONIC_S)
    sizes = (
        hpss._odd(hpss.HARMONIC_S * RATE_HZ / grid.hop),
        hpss._odd(hpss.PERCUSSIVE_HZ * grid.fft / RATE_HZ),
    )
    tones_of_librosa, _ = librosa_hpss(magnitudes.T, kernel_size=sizes, mask=True)
    np.testing.assert_allclose(1 - mask.T, tones_of_librosa, atol=1e-5)


def test_the_result_does_not_depend_on_the_blocks() -> None:
    """Reference: the same sound with another beginning, which moves the blocks; 1e-5 of 0.9."""
    audio = mixed(tune(40.0), drums(40.0))
    grid = hpss._grid(audio, hpss.OVERLAP)
    assert grid.n_frames > 1.5 * hpss.BLOCK_FRAMES
    cut = 300 * grid.hop
    whole = source_of(audio, "harmonic").audio.samples[:, cut:]
    later = source_of(Audio(audio.samples[:, cut:], RATE_HZ), "harmonic").audio.samples
    np.testing.assert_allclose(later[:, RATE_HZ:], whole[:, RATE_HZ:], atol=1e-5)


def test_the_same_audio_gives_the_same_bits() -> None:
    audio = mixed(tune(3.0), drums(3.0))
    before = audio.samples.copy()
    audio.samples.flags.writeable = False
    first, again = source_of(audio, "harmonic"), source_of(audio, "harmonic")
    np.testing.assert_array_equal(first.audio.samples, again.audio.samples)
    np.testing.assert_array_equal(audio.samples, before)
    assert hpss.percussive_share(audio) == hpss.percussive_share(audio)


@pytest.mark.parametrize("seconds", [1.0, 23.0, 31.0, 60.0])
def test_the_beginning_alone_has_the_same_bits(seconds: float) -> None:
    audio, n_samples = mixed(tune(50.0), drums(50.0)), round(seconds * RATE_HZ)
    whole = hpss.harmonic(audio, never).samples
    beginning = hpss.harmonic(audio, never, n_samples).samples
    np.testing.assert_array_equal(beginning, whole[:, :n_samples])


@pytest.mark.parametrize("duration_s", [0.5, 29.99, 30.0, 30.01, 47.9, 48.0, 48.02, 66.5, 120.0, 181.3])
def test_what_is_needed_of_a_track_reaches_to_the_end_of_the_last_window(duration_s: float) -> None:
    last = windows(math.ceil(duration_s * 50), 1500, round(1500 * STRIDE))[-1]
    long, short = (Audio(np.zeros((1, seconds * RATE_HZ), np.float32), RATE_HZ) for seconds in (220, 12))
    needed = melody.needed_samples(long, duration_s)
    assert needed >= (last.start / 50 + melody.WINDOW_S + melody.TAIL_S) * RATE_HZ
    assert melody.needed_samples(short, duration_s) == short.n_samples


def test_melodies_are_prepared_once_for_each_track(without_demucs: None) -> None:
    drummed, plain = mixed(tune(40.0), drums(40.0)), mixed(tune(40.0))

    def request(name: str, audio: Audio, wanted: Melody, duration_s: float = 30.0) -> VariationRequest:
        return VariationRequest(name, name, audio, duration_s, 0, {"melody": wanted})

    requests = [
        request("a", drummed, "auto"),
        request("b", drummed, "auto", 10.0),
        request("c", drummed, "mix"),
        request("d", plain, "auto"),
        request("e", drummed, "demucs"),
    ]
    found = melody.prepare(requests, never)
    assert list(found) == ["a", "b", "c", "d"]  # demucs is left to the generator
    assert found["a"] is found["b"]
    assert found["c"] == found["d"] == (None, "mix")
    audio, source = found["a"]
    assert source == "harmonic"
    assert audio is not None
    np.testing.assert_array_equal(audio.samples, hpss.harmonic(drummed, never).samples[:, : 31 * RATE_HZ])


def test_auto_is_left_to_the_generator_where_demucs_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demucs, "find", lambda: Path("weights"))
    request = VariationRequest("a", "a", mixed(tune(2.0)), 1.0, 0, {"melody": "auto"})
    assert melody.prepare([request], never) == {}


@pytest.mark.parametrize("wanted", ["mix", "harmonic", "auto"])
@pytest.mark.parametrize("n_samples", [0, 1, 100, 5000])
def test_very_short_sounds_are_accepted(wanted: Melody, n_samples: int) -> None:
    audio = Audio(mixed(tune(0.5)).samples[:, :n_samples], RATE_HZ)
    found = source_of(audio, wanted)
    assert found.audio.n_samples == n_samples
    assert np.isfinite(found.audio.samples).all()


def test_a_stop_ends_the_separation() -> None:
    with pytest.raises(Stopped):
        melody_source(mixed(tune(1.0)), "harmonic", should_stop=lambda: True)


# --- auto ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "melodic",
    [
        pytest.param(tones(440.0, 523.25, 659.26, 880.0, seconds=8.0), id="sines"),
        pytest.param(mixed(tune()), id="plucked"),
        pytest.param(synth.pads(), id="pads"),
        pytest.param(synth.drone(), id="drone"),
    ],
)
@pytest.mark.parametrize("gain", [1.0, 1e-3])
def test_auto_leaves_melodic_tracks_as_they_are(melodic: Audio, gain: float) -> None:
    audio = Audio(melodic.samples * np.float32(gain), melodic.sample_rate)
    found = source_of(audio, "auto")
    assert found.source == "mix"
    assert found.audio is audio
    assert share_of(audio) < 0.5 * melody.MELODIC


@pytest.mark.parametrize("drum_level", [0.5, 1.0, 4.0])
def test_auto_filters_tracks_with_drums(without_demucs: None, drum_level: float) -> None:
    track = mixed(tune(), drum_level * drums())
    assert source_of(track, "auto").source == "harmonic"
    assert share_of(track) > 1.2 * melody.MELODIC


def test_auto_filters_tracks_with_drums_and_a_strong_bass(without_demucs: None) -> None:
    assert source_of(mixed(tune(), 2.0 * drums(), 2.0 * bass()), "auto").source == "harmonic"


@pytest.mark.parametrize("channel", [0, 1])
def test_auto_filters_tracks_with_drums_in_either_half(without_demucs: None, channel: int) -> None:
    silent = np.zeros(20 * RATE_HZ)
    halves = [drums(20.0), silent] if channel == 0 else [silent, drums(20.0)]
    assert source_of(mixed(tune(40.0), np.concatenate(halves)), "auto").source == "harmonic"


def test_auto_leaves_silence_as_it_is() -> None:
    silence = Audio(np.zeros((2, RATE_HZ), np.float32), RATE_HZ)
    assert source_of(silence, "auto").source == "mix"
    assert hpss.percussive_share(silence) is None
    assert not source_of(silence, "harmonic").audio.samples.any()


def test_the_mix_is_the_track_itself() -> None:
    audio = mixed(tune(1.0), drums(1.0))
    assert source_of(audio, "mix").audio is audio


# --- demucs -------------------------------------------------------------------------------------------


def test_a_missing_demucs_is_an_error_with_the_command(without_demucs: None) -> None:
    with pytest.raises(MissingPackage, match=r"pip install demucs=="):
        source_of(mixed(drums(1.0)), "demucs")


@pytest.fixture
def need_demucs() -> None:
    import demucs.htdemucs  # noqa: F401


@pytest.fixture
def caches(need_demucs: None, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub (`caches`/hub) and of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def tiny_demucs() -> Any:
    """A random HTDemucs like htdemucs: four stems, stereo, but at 16 kHz and in segments of 0.75 s."""
    import torch
    from demucs.htdemucs import HTDemucs

    widths = {"channels": 8, "bottom_channels": 16, "nfft": 1024, "t_layers": 1, "t_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HTDemucs(
            sources=["drums", "bass", "other", "vocals"],
            segment=Fraction(3, 4),
            samplerate=16000,
            t_hidden_scale=1.0,
            **widths,
        )
    return model.half().float().eval()  # rounded as in the files, which are in half precision


def as_safetensors(caches: Path, model: Any) -> Path:
    """The file of adefossez/HTDemucs, as demucs 4.1's `load_safetensors_model` reads it."""
    from safetensors.torch import save_file

    def encode(value: Any) -> Any:
        assert isinstance(value, Fraction)
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}

    args, kwargs = model._init_args_kwargs
    about = {"klass": "demucs.htdemucs.HTDemucs", "args": json.dumps(args)}
    about["kwargs"] = json.dumps(kwargs, default=encode)
    folder = caches / "hub" / "models--adefossez--HTDemucs" / "snapshots" / ("b" * 40)
    folder.mkdir(parents=True)
    path = folder / "955717e8.safetensors"
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path, about)
    return path


def as_pickle(caches: Path, model: Any, **more: Any) -> Path:
    """The file of demucs 4.0: `serialize_model` and `save_with_checksum`."""
    from demucs.states import get_state, save_with_checksum

    args, kwargs = model._init_args_kwargs
    package = {
        "klass": type(model),
        "args": args,
        "kwargs": kwargs,
        "state": get_state(model, None, half=True),
    }
    package["training_args"] = {"optim": {"lr": 3e-4, "beta": np.float64(0.9)}, "dset": ["musdb", None, True]}
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    save_with_checksum(package | more, folder / "955717e8.th")
    return next(folder.iterdir())


SAVERS = pytest.mark.parametrize("save", [as_safetensors, as_pickle])


@SAVERS
def test_demucs_keeps_vocals_and_other(caches: Path, save: Any) -> None:
    """Reference: demucs' own apply_model without shifts, at the model's rate; 1e-5 of its level."""
    import torch
    from demucs.apply import apply_model

    model = tiny_demucs()
    save(caches, model)
    audio = tones(440.0, 554.37, 659.26, 880.0, seconds=2.3, sample_rate=16000)
    found = source_of(audio, "demucs")
    assert found.source == "demucs"
    stems_of = apply_model(model, torch.from_numpy(audio.samples)[None], shifts=0, split=True)[0]
    expected = (stems_of[2] + stems_of[3]).mean(dim=0).numpy()
    assert found.audio.samples.shape == (1, audio.n_samples)
    np.testing.assert_allclose(found.audio.samples[0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("channels", "sample_rate"), [(1, 44100), (2, 44100), (2, 22050)])
def test_demucs_gives_the_tracks_length_and_rate(caches: Path, channels: int, sample_rate: int) -> None:
    as_safetensors(caches, tiny_demucs())
    audio = tones(440.0, seconds=1.2345, sample_rate=sample_rate, channels=channels)
    first, again = source_of(audio, "demucs"), source_of(audio, "demucs")
    assert (first.audio.sample_rate, first.audio.samples.shape) == (sample_rate, (1, audio.n_samples))
    assert first.audio.samples.dtype == np.float32
    np.testing.assert_array_equal(first.audio.samples, again.audio.samples)


@pytest.mark.parametrize("n_samples", [10, 100])
def test_demucs_takes_very_short_sounds(caches: Path, n_samples: int) -> None:
    as_safetensors(caches, tiny_demucs())
    found = source_of(Audio(mixed(tune(0.5)).samples[:, :n_samples], RATE_HZ), "demucs")
    assert found.audio.samples.shape == (1, n_samples)
    assert np.isfinite(found.audio.samples).all()


def test_a_long_track_is_separated_in_pieces(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: each piece of 2 s by itself; soxr is not used, as the rate is the model's."""
    monkeypatch.setattr(demucs, "PIECE_S", 2)
    as_safetensors(caches, tiny_demucs())
    audio = tones(440.0, 554.37, 659.26, 880.0, seconds=5.3, sample_rate=16000)
    found = source_of(audio, "demucs").audio.samples
    for start in (0, 32000, 64000):
        piece = slice(start, start + 32000)
        alone = source_of(Audio(audio.samples[:, piece], 16000), "demucs").audio.samples
        np.testing.assert_array_equal(found[:, piece], alone)


def test_a_stop_ends_demucs_at_the_next_segment(caches: Path) -> None:
    """Segments of 0.75 s every 0.56 s; it is stopped when the third would begin."""
    as_safetensors(caches, tiny_demucs())
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Stopped):
        melody_source(mixed(tune(4.0)), "demucs", should_stop=should_stop)
    assert len(asked) == 3


def test_auto_takes_demucs_for_mixed_material_only(caches: Path) -> None:
    assert source_of(mixed(tune(3.0), drums(3.0)), "auto").source == "harmonic"
    as_safetensors(caches, tiny_demucs())
    assert source_of(mixed(tune(3.0), drums(3.0)), "auto").source == "demucs"
    assert source_of(mixed(tune(3.0)), "auto").source == "mix"


def test_missing_weights_are_an_error_with_the_command(caches: Path) -> None:
    with pytest.raises(MissingWeights, match=r"hf download adefossez/HTDemucs 955717e8\.safetensors\."):
        source_of(mixed(drums(1.0)), "demucs")


@SAVERS
def test_damaged_weights_are_an_error_but_not_for_auto(
    caches: Path, save: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(caches, tiny_demucs())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="delete it and run hf download"):
        source_of(mixed(drums(1.0)), "demucs")
    assert source_of(mixed(tune(1.0), drums(1.0)), "auto").source == "harmonic"
    assert path.name in caplog.text


class Foreign:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of the file was run",)


def test_no_code_of_a_pickle_is_run(caches: Path) -> None:
    as_pickle(caches, tiny_demucs(), training_args=Foreign())
    with pytest.raises(BadCheckpoint, match="can't be used"):
        source_of(mixed(drums(1.0)), "demucs")


def test_only_htdemucs_is_opened(caches: Path) -> None:
    model = tiny_demucs()
    path = as_safetensors(caches, model)
    path.write_bytes(
        path.read_bytes().replace(b"demucs.htdemucs.HTDemucs", b"demucs.demucs.DemucsOfMine"[:24])
    )
    with pytest.raises(BadCheckpoint, match="it holds a demucs"):
        source_of(mixed(drums(1.0)), "demucs")
