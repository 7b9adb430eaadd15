"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

from __future__ import annotations

import gc
from pathlib import Path


def main(default_home: Path | None = None) -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    gc.disable()  # importing makes hardly any garbage, and looking for it takes a sixth of the time
    from pipeline.cli import commands

    gc.enable()
    return commands.main(default_home)
