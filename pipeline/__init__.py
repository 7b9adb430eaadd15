"""Similar variations of instrumentals, and vectors to find them by, in batch."""

__version__ = "0.1.0"
