"""Keeps outbox, working copies and records in agreement, and removes what is old."""
