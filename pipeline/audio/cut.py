"""How a file that ends too early is described."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """A file that lacks some of its sound."""

    promised_s: float | None  # None: the container has no total
    present_s: float | None  # None: only decoding can tell
    missing: str = "its end"
    what: str = "cut off"

    def sentence(self, decoded_s: float | None = None) -> str:
        """For the user, with what was decoded where the container alone could not tell."""
        present_s = decoded_s if self.present_s is None else self.present_s
        if present_s is None:
            return f"is {self.what}: {self.missing} is missing"
        if self.promised_s is None:
            return f"is {self.what}: {self.missing} is missing after {present_s:.1f} s"
        digits = 1 if abs(self.promised_s - present_s) >= 0.1 else 3
        there, all_of_it = (f"{seconds:.{digits}f} s" for seconds in (present_s, self.promised_s))
        return f"is {self.what}: {there} of the {all_of_it} its header promises"
