"""The migrations of the database, as sqlite-utils applies them.

Imported only where the database is written: importing sqlite-utils takes a quarter of a second, which
commands that only read, such as `status`, must not pay for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from pipeline.store.schema import MIGRATIONS

migrations = Migrations("pipeline")


def _execute(statements: Sequence[str], db: Database) -> None:
    for statement in statements:
        db.execute(statement)


for _name, _statements in MIGRATIONS.items():
    migrations(name=_name)(partial(_execute, _statements))
