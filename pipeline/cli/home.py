"""The home of a command: which folder it is, and how a new one is made."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.app import DEFAULT_CONFIG
from pipeline.config import Folders
from pipeline.errors import ConfigError
from pipeline.fs.names import printable
from pipeline.workspace import Workspace

TEMPLATE = Path(__file__).with_name("default.yaml")


def find_home(given: Path | None, default: Path | None, *, has_config: bool, program: str) -> Path:
    """The given folder, or `default`, or the current folder.

    Args:
        has_config: whether the command line names a configuration; then any existing folder will do.

    Raises:
        ConfigError: the folder is not a home. A mistyped path must not be filled with new folders.
    """
    home = given or default or Path.cwd()
    if not home.is_dir():
        problem = "does not exist" if not home.exists() else "is not a folder"
    elif has_config or (home / DEFAULT_CONFIG).is_file() or (home / Folders().inbox).is_dir():
        return home
    else:
        problem = f"is not a home: it has neither {DEFAULT_CONFIG} nor a folder inbox"
    raise ConfigError(
        f"{printable(home)} {problem}: name another home with --home, or make one with"
        f" `{program} init {printable(home)}`"
    )


def make_home(folder: Path) -> Workspace:
    """Write the commented default configuration and make the working folders.

    Raises:
        ConfigError: the folder has a configuration already.
        FolderUnusable: a folder can't be made.
    """
    config = folder / DEFAULT_CONFIG
    if config.exists():
        raise ConfigError(f"{printable(config)} exists: {printable(folder)} is a home already")
    workspace = Workspace.of(folder, Folders())
    workspace.prepare()
    config.parent.mkdir(exist_ok=True)
    shutil.copyfile(TEMPLATE, config)
    return workspace
