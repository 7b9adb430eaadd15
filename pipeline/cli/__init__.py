"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

import os
import signal
from pathlib import Path

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search reads the metadata of all packages


def main(default_home: Path | None = None) -> int:
    """See `commands.main`; an interrupt while the packages are imported ends without a traceback as well."""
    try:
        from pipeline.cli import commands
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return commands.main(default_home)
