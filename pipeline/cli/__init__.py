"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""

from pipeline.cli.commands import main as main
