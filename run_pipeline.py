#!/usr/bin/env python3
"""Entry point: `python run_pipeline.py --help`."""

import sys
from pathlib import Path

try:
    from pipeline.cli.commands import main
except ModuleNotFoundError as e:
    if (e.name or "").split(".")[0] == "pipeline":
        raise
    here = Path(__file__).resolve().parent
    install = f"{sys.executable} -m pip install -r {here}/requirements-core.txt"
    print(f"The package {e.name} is not installed: {install}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(default_home=Path(__file__).resolve().parent))
