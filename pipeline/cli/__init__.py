"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

from __future__ import annotations

import gc
from pathlib import Path


def main(default_home: Path | None = None) -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    gc.disable()  # imports leave little garbage, and searching for it takes a sixth of the start time
    from pipeline.cli import commands

    gc.freeze()
    gc.enable()
    return commands.main(default_home)
