"""What can be heard in a track, without a model: spectra, beats, bars and the similarity of its beats.

The modules build on each other in this order: `spectra`, `beats`, `features`, `bars`.
"""
