"""The papers' tables: declared as cells, run one by one, and set beside the papers' own numbers.

A row of one's own stands beside them when its method is in `METHODS`, a dataset when its recipe is in `hf_anomaly.data.RECIPES`. DIA with another dissolver:

    from dataclasses import replace
    from pathlib import Path
    from hf_anomaly.reproduction import METHODS, TABLES, Selection, run_table, write_table
    from hf_anomaly.reproduction.contrastive import Contrastive, Dissolving

    METHODS["dia_resize"] = Contrastive("DIA, resized", Dissolving("resize", {"resolution": 16}, model=None))
    sections = tuple(replace(section, methods=("dia", "dia_resize")) for section in TABLES["dia/1"].sections)
    table = replace(TABLES["dia/1"], id="mine", sections=sections)
    selection = Selection(Path("runs/mine"), datasets=("pneumonia_mnist",), seeds=(0,), data_dir="path/to/data")
    run_table(table, selection, command=[])
    print(write_table(table, selection, command=[])[0].read_text(encoding="utf-8"))
"""

from .budgets import BUDGETS
from .cells import Cell, Row, Section, Table
from .figures import FIGURES, find_figure, write_figure
from .methods import METHODS
from .report import write_table
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
    "write_table",
]
