"""The tables that there are. Each is declared in its paper's module."""

from ..errors import InputError
from .cells import Table
from .papers import addp, dia, shared_ae

TABLES = {table.id: table for table in (*dia.TABLES, *shared_ae.TABLES, *addp.TABLES)}


def find_table(table_id: str) -> Table:
    """The table of this id.

    Raises:
        InputError: there is none; names those there are.
    """
    if table_id not in TABLES:
        raise InputError(f"there is no table {table_id!r}; the tables: {', '.join(TABLES)}, and calibration")
    return TABLES[table_id]
