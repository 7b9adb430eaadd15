"""The long-running side: the loops of `once` and `watch`, signals, health and systemd notification."""
