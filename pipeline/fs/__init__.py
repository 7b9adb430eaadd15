"""File-system helpers: atomic writes, copying, disk space, mounts, names and a safe walk."""
