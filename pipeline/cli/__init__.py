"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

import os

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search reads the metadata of all packages

from pipeline.cli.commands import main as main
