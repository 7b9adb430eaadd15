#!/usr/bin/env python3
"""Entry point: `python run_pipeline.py --help`."""

import sys
from pathlib import Path

try:
    from pipeline.cli import main
except ModuleNotFoundError as e:
    if (e.name or "").split(".")[0] == "pipeline":
        raise
    here = Path(__file__).resolve().parent
    sys.exit(
        f"The package {e.name} is not installed:"
        f" {sys.executable} -m pip install -r {here}/requirements-core.txt"
    )

if __name__ == "__main__":
    sys.exit(main(default_home=Path(__file__).resolve().parent))
