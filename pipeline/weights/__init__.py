"""Model weights: where they are on this machine, how they get there, and whether they are whole."""
