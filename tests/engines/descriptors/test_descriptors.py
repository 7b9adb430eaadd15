"""The weight-free embedder, on synthesized music."""

from __future__ import annotations

import io
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import soundfile
from loops import BANDS, play

from pipeline.audio import resample
from pipeline.engines.base import Embedder, EngineSettings
from pipeline.engines.descriptors import ENGINE
from pipeline.engines.descriptors.features import RATE_HZ, raw_features, window_edges
from pipeline.engines.descriptors.filters import mel_bank
from pipeline.engines.descriptors.layout import DIM, LAYOUT
from pipeline.errors import Stopped
from pipeline.music.spectra import chroma_bank
from pipeline.records import Audio, Embedding, Samples


def embedder() -> Embedder:
    return ENGINE.load(EngineSettings())  # type: ignore[return-value]


def embed(audio: Audio) -> Embedding:
    return embedder().embed(audio, should_stop=lambda: False)


@cache
def music(name: str, tempo_bpm: float = 110.0, key: int = 0) -> Audio:
    """20 s of a band, read-only."""
    audio = play(name, tempo_bpm=tempo_bpm, key=key)
    audio.samples.flags.writeable = False
    return audio


each_band = pytest.mark.parametrize(
    "name", [name if k < 2 else pytest.param(name, marks=pytest.mark.long) for k, name in enumerate(BANDS)]
)


@cache
def band(name: str, tempo_bpm: float = 110.0, key: int = 0) -> Embedding:
    return embed(music(name, tempo_bpm, key))


def opening(name: str, seconds: float) -> Audio:
    audio = music(name)
    return Audio(audio.samples[:, : round(seconds * audio.sample_rate)], audio.sample_rate)


def cosine(a: Embedding, b: Embedding) -> float:
    return float(a.track @ b.track)


def block(name: str, audio: Audio) -> Samples:
    """A block's raw numbers for the first window of a track."""
    mono = resample(Audio(audio.mono()[None], audio.sample_rate), RATE_HZ).samples[0]
    start = sum(b.dims for b in LAYOUT[: [b.name for b in LAYOUT].index(name)])
    return raw_features(mono[: 10 * RATE_HZ])[start:][: next(b.dims for b in LAYOUT if b.name == name)]


def test_the_blocks_cover_the_vector_and_their_shares_sum_to_one() -> None:
    assert sum(b.dims for b in LAYOUT) == DIM == embedder().dim
    assert sum(b.share for b in LAYOUT) == pytest.approx(1.0)
    for b in LAYOUT:
        assert len(b.centers) in (1, b.dims) and len(b.spreads) in (1, b.dims)
        assert min(b.spreads) > 0


def test_vectors_have_the_layouts_length_and_are_unit_float32() -> None:
    embedding = band("house")
    assert embedding.track.shape == (DIM,)
    assert embedding.windows.shape == (2, DIM)
    assert embedding.times_s.shape == (2, 2)
    for vectors in (embedding.track, embedding.windows, embedding.times_s):
        assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding.windows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedding.track), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "windows_s"),
    [
        (1.0, [(0, 1)]),
        (9.0, [(0, 9)]),
        (14.0, [(0, 14)]),
        (15.0, [(0, 10), (10, 15)]),
        (20.0, [(0, 10), (10, 20)]),
        (23.0, [(0, 10), (10, 23)]),
    ],
)
def test_windows_are_10_s_and_a_tail_below_5_s_joins_the_last(
    seconds: float, windows_s: list[tuple[int, int]]
) -> None:
    edges = window_edges(round(seconds * RATE_HZ))
    assert [(a / RATE_HZ, b / RATE_HZ) for a, b in edges] == windows_s


def test_times_end_where_the_track_ends() -> None:
    audio = opening("ballad", 16.3)
    times_s = embed(audio).times_s
    np.testing.assert_allclose(times_s, [[0, 10], [10, audio.duration_s]], atol=1e-3)


def test_the_track_is_the_mean_of_its_windows_weighted_by_length() -> None:
    embedding = embed(opening("rock", 16.0))
    mean = np.array([10.0, 6.0]) @ embedding.windows.astype(np.float64)
    np.testing.assert_allclose(embedding.track, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_windows_vector_depends_on_its_own_samples_alone() -> None:
    # At the engine's own rate there is no resampling, whose filter would reach across the window's end.
    whole = resample(opening("arps", 20.0), RATE_HZ)
    half = Audio(whole.samples[:, : 10 * RATE_HZ], RATE_HZ)
    np.testing.assert_array_equal(embed(whole).windows[0], embed(half).windows[0])


def test_the_same_track_gives_the_same_bits() -> None:
    audio = opening("house", 11.0)
    first, second = embed(audio), embed(Audio(audio.samples.copy(), audio.sample_rate))
    for name in ("track", "windows", "times_s"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


def test_read_only_samples_are_accepted() -> None:
    audio = opening("drums", 2.0)
    assert not audio.samples.flags.writeable
    assert embed(audio).windows.shape == (1, DIM)


@pytest.mark.parametrize("name", BANDS)
def test_another_level_gives_the_same_vector(name: str) -> None:
    audio = opening(name, 10.0)
    quiet = Audio(audio.samples * np.float32(0.01), audio.sample_rate)
    np.testing.assert_allclose(embed(quiet).track, embed(audio).track, atol=1e-4)


def test_mono_and_another_sample_rate_give_nearly_the_same_vector() -> None:
    audio = opening("house", 10.0)
    reference = embed(audio)
    assert cosine(reference, embed(Audio(audio.mono()[None], audio.sample_rate))) > 0.99999
    assert cosine(reference, embed(resample(audio, 48000))) > 0.999


@each_band
def test_a_low_bit_rate_mp3_has_nearly_the_vector_of_its_source(name: str) -> None:
    # Measured 0.993 and more over the five bands; two bands have 0.37 at most.
    audio, file = music(name), io.BytesIO()
    soundfile.write(
        file, audio.samples.T, audio.sample_rate, format="MP3", compression_level=0.8, bitrate_mode="CONSTANT"
    )
    file.seek(0)
    decoded, rate = soundfile.read(file, dtype="float32", always_2d=True)
    assert cosine(band(name), embed(Audio(np.ascontiguousarray(decoded.T), rate))) > 0.98


@each_band
def test_a_band_in_another_key_or_tempo_is_nearer_to_itself_than_to_any_other_band(name: str) -> None:
    others = [band(other) for other in BANDS if other != name]
    for variant in (band(name, key=2), band(name, tempo_bpm=113.0)):
        assert cosine(band(name), variant) > 0.1 + max(cosine(variant, other) for other in others)


def test_different_bands_are_about_as_far_apart_as_unrelated_vectors() -> None:
    cosines = [cosine(band(a), band(b)) for a, b in combinations(BANDS, 2)]
    assert abs(np.mean(cosines)) < 0.25
    assert max(cosines) < 0.6


def test_windows_find_the_other_window_of_their_own_track_first() -> None:
    versions = [band(name, key=key) for name in BANDS for key in (0, 2)]
    vectors = np.concatenate([version.windows for version in versions])
    track = np.repeat(np.arange(len(versions)), 2)
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert np.mean(track[np.argmax(cosines, axis=1)] == track) >= 0.9


def test_transposition_turns_the_key_and_keeps_the_chords() -> None:
    # Tolerances: the chord magnitudes of one loop differ by 0.1 between progressions and by 0.03 here, where
    # notes fall elsewhere between the STFT's bins.
    low, high = music("house"), music("house", key=2)
    key, turned = block("key", low), block("key", high)
    fits = [float(np.corrcoef(np.roll(key, k), turned)[0, 1]) for k in range(12)]
    assert int(np.argmax(fits)) == 2
    assert fits[2] > 0.9
    np.testing.assert_allclose(block("chords", high)[:6], block("chords", low)[:6], atol=0.08)


def clicks(tempo_bpm: float) -> Audio:
    """A short burst of noise on every beat."""
    samples, burst = np.zeros(10 * RATE_HZ, dtype=np.float32), np.random.default_rng(1).standard_normal(400)
    for start in np.arange(0.2, 9.9, 60 / tempo_bpm):
        samples[round(start * RATE_HZ) :][:400] += (0.3 * burst * np.hanning(400)).astype(np.float32)
    return Audio(samples[None], RATE_HZ)


@pytest.mark.parametrize("tempo_bpm", [65.0, 90.0, 128.0, 180.0])
def test_clicks_peak_in_the_bin_of_their_tempo(tempo_bpm: float) -> None:
    # Reference: bins are eighths of an octave from 37.5 bpm up. Whole fractions of the tempo also repeat.
    tempo = block("tempo", clicks(tempo_bpm))
    fastest = max(np.flatnonzero(tempo > 0.7 * tempo.max()))
    assert abs(fastest - 8 * np.log2(tempo_bpm / 37.5) + 0.5) <= 1.0


def test_the_density_is_the_number_of_clicks_per_second() -> None:
    clarity, density, *_ = block("pulse", clicks(120.0))
    assert density == pytest.approx(2.0, abs=0.15)
    assert clarity > 0.8


@pytest.mark.long  # importing librosa's filters compiles them
@pytest.mark.parametrize(("rate_hz", "n_fft"), [(RATE_HZ, 4096), (16000, 1024)])
def test_the_filter_banks_are_librosas_to_the_bit(rate_hz: int, n_fft: int) -> None:
    import librosa

    mel = librosa.filters.mel(sr=rate_hz, n_fft=n_fft, n_mels=40, fmin=30.0)
    chroma = librosa.filters.chroma(sr=rate_hz, n_fft=n_fft, ctroct=5.0, octwidth=1.0)
    np.testing.assert_array_equal(mel_bank(rate_hz, n_fft, 40, 30.0), mel)
    np.testing.assert_array_equal(chroma_bank(rate_hz, n_fft, 1.0), chroma.astype(np.float32))


def test_noise_is_flat_and_a_sine_is_not() -> None:
    time_s = np.arange(5 * RATE_HZ) / RATE_HZ
    sine = (0.3 * np.sin(2 * np.pi * 1000 * time_s)).astype(np.float32)
    noise = (0.1 * np.random.default_rng(2).standard_normal(sine.size)).astype(np.float32)
    centroid, spread, flatness = block("spectrum", Audio(sine[None], RATE_HZ))[:3]
    assert centroid == pytest.approx(0.0, abs=0.02)  # octaves from 1 kHz
    assert spread < 0.3
    assert block("spectrum", Audio(noise[None], RATE_HZ))[2] > flatness + 10


def test_the_crest_of_a_sine_is_3_db() -> None:
    sine = np.sin(2 * np.pi * 441 * np.arange(5 * RATE_HZ) / RATE_HZ).astype(np.float32)
    assert block("dynamics", Audio(sine[None], RATE_HZ))[-1] == pytest.approx(3.01, abs=0.02)


def silence(seconds: float) -> Audio:
    return Audio(np.zeros((2, round(seconds * 44100)), dtype=np.float32), 44100)


@pytest.mark.parametrize(
    "audio",
    [
        silence(3.0),
        Audio(np.full((1, 44100), 1e-6, dtype=np.float32), 44100),
        Audio(np.ones((1, 30), dtype=np.float32), 44100),
        play("rock", seconds=1.0),
        Audio(np.eye(1, 60000, 30000, dtype=np.float32), 44100),
        Audio(
            np.concatenate([np.zeros((1, 220500)), np.ones((1, 220500))], axis=1).astype(np.float32), 44100
        ),
    ],
    ids=["silence", "near-silent offset", "a millisecond", "one second", "one impulse", "a step"],
)
def test_odd_input_has_finite_unit_vectors(audio: Audio) -> None:
    embedding = embed(audio)
    assert np.isfinite(embedding.windows).all()
    np.testing.assert_allclose(np.linalg.norm(embedding.track), 1, atol=1e-6)


def test_silence_of_any_length_has_the_same_vector() -> None:
    np.testing.assert_allclose(embed(silence(1.0)).track, embed(silence(22.0)).track, atol=1e-6)


def test_it_stops_when_asked_between_windows() -> None:
    asked = iter([False, True])
    with pytest.raises(Stopped):
        embedder().embed(opening("arps", 20.0), should_stop=lambda: next(asked))
