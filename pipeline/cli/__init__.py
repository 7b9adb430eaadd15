"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

from __future__ import annotations

import gc
import signal
from pathlib import Path


def main(default_home: Path | None = None) -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    gc.disable()  # imports leave little garbage, and searching for it takes a sixth of the start time
    try:
        from pipeline.cli import commands
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    gc.freeze()
    gc.enable()
    return commands.main(default_home)
