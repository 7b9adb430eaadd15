"""What can be heard in a track, without a model: spectra, beats, bars and the similarity of its beats.

The modules build on each other in this order: `spectra`, `features`, `meter`, `beats`, `bars`.
"""

PROMPT_VERSION = "2"  # of `words`: raised when the same track would get other words
