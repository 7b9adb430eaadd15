"""The SQLite database: the only package that knows it."""
