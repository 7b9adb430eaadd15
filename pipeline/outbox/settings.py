"""The settings that the sound of a take depends on, as its record and the tags of its file have them.

They are left out where they are as in `UNSAID`, so most files say nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline.config import Normalize, Output

# The defaults of the time when files began to have settings. They must never change, even if those of the
# configuration do, because files that are out there rely on them. A new setting is added with the value that
# keeps the sound as it was without it.
UNSAID: Mapping[str, Any] = MappingProxyType(
    {
        "length_s": 30.0,
        "normalize": {
            "sample_rate": 44100,
            "loudness_lufs": -14.0,
            "true_peak_dbtp": -1.0,
            "trim_silence": True,
            "trim_below_dbfs": -60.0,
            "accept_truncated": False,
        },
        "output": {
            "format": "wav",
            "sample_rate": None,
            "bit_depth": 24,
            "loudness_lufs": -14.0,
            "album": False,
            "true_peak_dbtp": -1.0,
            "limiter": False,
            "length": "exact",
            "loop": False,
            "fade_in_s": 0.0,
            "fade_out_s": 0.0,
        },
    }
)
# What only decides whether a source is taken at all, as wide as it goes: this one was taken.
ANY_SOURCE = {"min_duration_s": 0.1, "max_duration_s": 36000.0, "max_size_mb": 1e9}


@dataclass(frozen=True)
class Settings:
    """What a take depends on beside its request."""

    normalize: Normalize
    output: Output
    length_s: float  # that was asked for

    def said(self) -> dict[str, Any]:
        """What differs from `UNSAID`, as JSON values; empty if nothing does."""
        found: dict[str, Any] = {}
        for name, model in (("normalize", self.normalize), ("output", self.output)):
            values, unsaid = model.model_dump(mode="json"), UNSAID[name]
            if own := {key: values[key] for key, value in unsaid.items() if values[key] != value}:
                found[name] = own
        return found | ({} if self.length_s == UNSAID["length_s"] else {"length_s": self.length_s})

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Settings:
        """The settings of which this was said; no source is refused by them.

        Raises:
            ValueError: this program does not know such settings.
        """
        if unknown := said.keys() - UNSAID.keys():
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(
            Normalize.model_validate({**UNSAID["normalize"], **said.get("normalize", {}), **ANY_SOURCE}),
            Output.model_validate({**UNSAID["output"], **said.get("output", {})}),
            float(said.get("length_s", UNSAID["length_s"])),
        )
