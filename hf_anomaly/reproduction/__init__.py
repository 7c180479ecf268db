"""The papers' tables: declared as cells, run one by one, and set beside the papers' own numbers."""

from .budgets import BUDGETS
from .cells import Cell, Row, Section, Table
from .figures import FIGURES, find_figure, write_figure
from .methods import METHODS
from .report import write_report
from .running import Selection, describe, run_table
from .tables import TABLES, find_table

__all__ = [
    "BUDGETS",
    "FIGURES",
    "METHODS",
    "TABLES",
    "Cell",
    "Row",
    "Section",
    "Selection",
    "Table",
    "describe",
    "find_figure",
    "find_table",
    "run_table",
    "write_figure",
    "write_report",
]
