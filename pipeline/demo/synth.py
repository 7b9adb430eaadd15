"""Instruments, effects and mastering for the bundled instrumental: numpy and scipy, no samples.

Pitched sounds are sums of partials that all lie below 18 kHz (additive, or FM of a small index), so
there is no aliasing. A harmonic series under a moving low-pass is one polynomial: the
imaginary part of sum a_k z^k with z = r(t) exp(i phi(t)), by Horner's rule; r <= 1 damps harmonic k
by r^k. Every sound starts and ends at zero through raised-cosine ramps.

Sounds are float64, (samples,) or (2, samples), at RATE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

Signal = NDArray[np.float64]

RATE = 44100  # Hz
HIGHEST_HZ = 18000.0  # no partial is synthesized above this
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
SAW = 1 / np.arange(1, 41)  # amplitudes of the harmonics
HOLLOW = SAW * np.where(np.arange(1, 41) % 2, 1.0, 0.25)  # between a saw and a square
# the partials of a tuned bar: ratio, amplitude, decay in s
VIBRAPHONE = ((1.0, 1.0, 0.8), (4.0, 0.3, 0.3), (10.0, 0.06, 0.07))


class Voice(NamedTuple):
    """A subtractive synth's patch; times in s."""

    harmonics: Signal
    r: tuple[float, float, float]  # brightness: at rest, added by the attack, decay of the attack
    decay_s: float
    attack_s: float
    release_s: float  # after the note's length
    sub: float = 0.0  # a sine at the fundamental
    vibrato: float = 0.0  # relative depth, rising from 0.18 s on


class Noise(NamedTuple):
    """A drum of band-passed noise."""

    band_hz: tuple[float, float]
    decay_s: float
    gain: float
    pan: float
    strokes: int = 1  # 11 ms apart: several make a clap


BASS = Voice(SAW, (0.52, 0.42, 0.11), 0.9, 0.004, 0.0, sub=0.5)
LEAD = Voice(HOLLOW, (0.7, 0.2, 0.35), 4.0, 0.018, 0.12, vibrato=0.005)
PLUCK = Voice(HOLLOW, (0.5, 0.42, 0.07), 0.12, 0.002, 0.25)
CLAP = Noise((900, 6500), 0.075, 1.0, -0.05, strokes=3)
HAT = Noise((7000, 15000), 0.022, 0.7, 0.3)
OPEN_HAT = Noise((6000, 14000), 0.09, 0.55, 0.3)
CRASH = Noise((3500, 14000), 0.45, 0.5, -0.3)


def note_hz(name: str, cents: float = 0.0) -> float:
    """Frequency of a note like "Bb3" in equal temperament, A4 = 440 Hz."""
    semitone = SEMITONES[name[0]] + name.count("#") - name.count("b") + 12 * (int(name[-1]) - 4)
    return float(440.0 * 2 ** ((semitone - 9 + cents / 100) / 12))


def times(seconds: float) -> Signal:
    return np.arange(round(seconds * RATE)) / RATE


def ramps(n: int, attack_s: float, release_s: float) -> Signal:
    """An envelope of `n` samples: raised-cosine rise, 1, raised-cosine fall to exactly 0."""
    envelope = np.ones(n)
    for edge, length_s in ((envelope, attack_s), (envelope[::-1], release_s)):
        length = max(1, round(length_s * RATE))
        edge[:length] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(length) / length)[:n]
    return envelope


def series(hz: float | Signal, amplitudes: Signal, r: Signal, start: float = 0.0) -> Signal:
    """A harmonic series (see the module); frequency and r may move; `start`: phase in cycles."""
    curve = np.broadcast_to(np.asarray(hz, dtype=np.float64), r.shape)
    z = r * np.exp(2j * np.pi * (start + np.cumsum(curve) / RATE))
    total = np.zeros(r.size, dtype=np.complex128)
    for amplitude in amplitudes[: int(HIGHEST_HZ / curve.max())][::-1]:
        total += amplitude
        total *= z
    return total.imag


def tone(voice: Voice, hz: float, seconds: float, velocity: float) -> Signal:
    """One note of a patch; mono."""
    t = times(seconds + voice.release_s)
    rest, attack, attack_s = voice.r
    wobble = voice.vibrato * np.clip((t - 0.18) / 0.25, 0, 1) * np.sin(2 * np.pi * 5.4 * t)
    sound = series(hz * (1 + wobble), voice.harmonics, rest + attack * velocity * np.exp(-t / attack_s))
    sound += voice.sub * np.sin(2 * np.pi * hz * t)
    envelope = ramps(t.size, voice.attack_s, max(voice.release_s, 0.035))
    return np.asarray(velocity * sound * np.exp(-t / voice.decay_s) * envelope)


def electric_piano(hz: float, seconds: float, velocity: float) -> Signal:
    """Two FM pairs, body (1:1) and tine (14:1), in the way of the DX7's, swaying in stereo; (2, samples)."""
    t = times(seconds + 0.25)
    phase = 2 * np.pi * hz * t
    body = np.sin(phase + 1.7 * velocity * np.exp(-t / 0.5) * np.sin(phase))
    tine = np.sin(phase + 0.35 * velocity * np.exp(-t / 0.09) * np.sin(14 * phase))
    mono = velocity * (0.75 * body + 0.25 * tine) * np.exp(-t / 1.1) * ramps(t.size, 0.004, 0.22)
    sway = 0.25 * np.sin(2 * np.pi * 1.05 * t)
    return np.stack([mono * (1 - sway), mono * (1 + sway)])


def pad(name: str, seconds: float) -> Signal:
    """Four soft saws, two for each side, detuned by a few cents; (2, samples)."""
    t = times(seconds + 0.6)
    r = 0.68 + 0.16 * np.sin(np.pi * np.clip(t / seconds, 0, 1)) ** 2
    left = series(note_hz(name, -7), SAW[:16], r) + series(note_hz(name, 3), SAW[:16], r, 0.4)
    right = series(note_hz(name, 7), SAW[:16], r, 0.2) + series(note_hz(name, -3), SAW[:16], r, 0.7)
    return np.stack([left, right]) * ramps(t.size, 0.18, 0.6)


def vibraphone(hz: float, seconds: float, velocity: float) -> Signal:
    """The partials of a tuned bar and a slow tremolo; mono."""
    t = times(seconds + 0.9)
    sound = np.zeros(t.size)
    for ratio, amplitude, decay_s in VIBRAPHONE:
        sound += amplitude * np.sin(2 * np.pi * ratio * hz * t) * np.exp(-t / decay_s)
    tremolo = 0.88 + 0.12 * np.cos(2 * np.pi * 5.0 * t)
    return np.asarray(velocity * sound * tremolo * ramps(t.size, 0.003, 0.6))


def drum(hz: float, drop_hz: float, decay_s: float, velocity: float) -> Signal:
    """Kick and toms: a sine that starts `drop_hz` above `hz` and falls to it; mono."""
    t = times(0.32)
    cycles = hz * t + drop_hz * 0.032 * (1 - np.exp(-t / 0.032))
    envelope = np.exp(-t / decay_s) * ramps(t.size, 0.0015, 0.1)
    return np.asarray(velocity * np.sin(2 * np.pi * cycles) * envelope)


def noise(sound: Noise, rng: np.random.Generator, velocity: float) -> Signal:
    """One stroke at its panning position; (2, samples)."""
    t = times(5 * sound.decay_s + 0.03)
    envelope = np.zeros(t.size)
    for k in range(sound.strokes):
        since = t - 0.011 * k
        decay_s = sound.decay_s if k == sound.strokes - 1 else 0.005
        envelope += np.where(since >= 0, np.exp(-np.maximum(since, 0) / decay_s), 0.0)
    band = signal.butter(2, sound.band_hz, "bandpass", fs=RATE, output="sos")
    hiss = signal.sosfilt(band, rng.standard_normal(t.size) * envelope)
    hiss *= sound.gain * velocity * ramps(t.size, 0.0008, 2 * sound.decay_s)
    return panned(hiss, sound.pan)


def panned(mono: Signal, position: float) -> Signal:
    """(samples,) to (2, samples) at constant power; -1 left, 1 right."""
    angle = (position + 1) * np.pi / 4
    return np.stack([np.cos(angle) * mono, np.sin(angle) * mono])


def add_at(bus: Signal, start: int, sound: Signal) -> None:
    """Mix a sound into a bus of (2, samples), from sample `start` on."""
    bus[:, start : start + sound.shape[-1]] += sound


def echo(bus: Signal, delay: int, repeats: int, feedback: float) -> Signal:
    """The repeats without the input, alternating between the sides, each with less treble than the last."""
    out = np.zeros_like(bus)
    duller = signal.butter(1, 4200, fs=RATE, output="sos")
    tap = bus
    for k in range(1, repeats + 1):
        tap = feedback * signal.sosfilt(duller, tap)[::-1]
        out[:, k * delay :] += tap[:, : -k * delay]
    return out


def reverb(bus: Signal, rng: np.random.Generator, decay_s: float) -> Signal:
    """The wet signal: convolution with noise whose treble decays three times as fast (T60 = decay_s)."""
    t = times(1.5 * decay_s)
    hiss = rng.standard_normal((2, t.size))
    low = signal.sosfilt(signal.butter(1, [220, 2500], "bandpass", fs=RATE, output="sos"), hiss)
    high = signal.sosfilt(signal.butter(1, 2500, "highpass", fs=RATE, output="sos"), hiss)
    response = low * np.exp(-6.9 * t / decay_s) + 0.5 * high * np.exp(-20.7 * t / decay_s)
    response *= ramps(t.size, 0.012, 0.5 * decay_s)
    response /= np.sqrt(np.sum(response**2, axis=1, keepdims=True))
    return np.asarray(signal.fftconvolve(bus, response, axes=1)[:, : bus.shape[1]])


def ducking(n: int, starts: list[int], depth: float) -> Signal:
    """A gain of `n` samples that dips at each start (4 ms) and recovers within 0.3 s: side-chain ducking."""
    t = times(0.3)
    dip = depth * np.exp(-t / 0.09) * ramps(t.size, 0.004, 0.1)
    gain = np.ones(n)
    for start in starts:
        gain[start : start + t.size] = np.minimum(gain[start : start + t.size], 1 - dip)
    return gain


def limited(bus: Signal, ceiling: float, window_s: float = 0.006) -> Signal:
    """Look-ahead limiting of the true peak, measured on the signal oversampled four times (BS.1770-4)."""
    peaks = np.abs(signal.resample_poly(bus, 4, 1, axis=1)).max(axis=0).reshape(-1, 4).max(axis=1)
    size = 2 * round(window_s * RATE / 2) + 1
    needed = ndimage.minimum_filter1d(ceiling / np.maximum(peaks, ceiling), size)
    window = np.hanning(size + 2)[1:-1]
    return np.asarray(bus * ndimage.convolve1d(needed, window / window.sum(), mode="nearest"))
