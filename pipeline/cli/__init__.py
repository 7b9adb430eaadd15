"""The command line: verbs, exit codes, and answers for people and programs. Nothing imports this package."""
