"""The SQLite database of tracks; no other package uses SQLite."""
