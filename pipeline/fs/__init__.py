"""File-system helpers: atomic writes, copying, disk space, mounts and names."""
