#!/usr/bin/env python3
"""Entry point: `python run_pipeline.py --help`."""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent

if __name__ == "__main__":
    try:
        from pipeline.cli import main

        sys.exit(main(default_home=HOME))
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "pipeline":
            raise
        install = f"{sys.executable} -m pip install -r {HOME}/requirements-core.txt"
        print(f"The package {e.name} is not installed: {install}", file=sys.stderr)
        sys.exit(2)
