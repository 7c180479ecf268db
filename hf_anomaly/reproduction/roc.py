"""ROC curves of a table's finished cells, from the scores that they left; nothing is trained for them."""

import logging
from dataclasses import dataclass

import numpy as np

from ..data.recipes import RECIPES
from ..errors import InputError
from .budgets import BUDGETS
from .cells import Section, Table
from .methods import BASELINES, METHODS
from .report import mean_and_std
from .running import Selection

logger = logging.getLogger(__name__)

GRID = np.linspace(0, 1, 501)  # of false-positive rates, at which curves are averaged
COLUMNS = 3  # panels beside each other


@dataclass(frozen=True)
class Curve:
    """A method on one dataset.

    Attributes:
        auroc: by seed, as the cells report it; the mean over the rows (normal classes).
        mean, std: (501,) true-positive rate at `GRID`, over the seeds; of one seed std is 0.
        cells, all_cells: how many it is drawn from, and how many of the selection there would be.
    """

    method: str
    auroc: dict[int, float]
    mean: np.ndarray
    std: np.ndarray
    cells: int
    all_cells: int


def roc_at_grid(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """True-positive rate at each false-positive rate of `GRID`; as in the AUROC, tied scores make a slope.

    Args:
        scores: (N,), higher = more anomalous.
        labels: (N,), 0 normal, 1 anomalous; both occur.

    Returns:
        (501,), the upper end of a vertical stretch.
    """
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(labels, scores)
    return np.interp(GRID, false, true)  # of equal false-positive rates the last, highest one


def curves(section: Section, methods: tuple[str, ...], selection: Selection) -> list[Curve]:
    """The methods of a section that have finished cells with scores. What is finished without scores is told in a warning.

    Raises:
        InputError: a file of scores is damaged.
    """
    found, without = [], 0
    seeds, rows = selection.seeds[: BUDGETS[selection.budget].max_seeds], section.rows[: BUDGETS[selection.budget].max_rows]
    for method in (method for method in section.methods if method in methods and METHODS[method].is_implemented):
        cells = [section.cell(row, method, seed, selection.budget) for seed in seeds for row in rows]
        finished = [(cell, result) for cell in cells if (result := selection.result(cell)) is not None]
        of_seeds: dict[int, list[tuple[float, np.ndarray]]] = {}
        for cell, result in finished:
            if (scores := selection.scores_file(cell)).is_file():
                of_seeds.setdefault(cell.seed, []).append((result["auroc"], roc_at_grid(*_read(scores))))
            else:
                without += 1
        # A seed whose classes are not all there would be the mean of others.
        whole = {seed: measured for seed, measured in of_seeds.items() if len(measured) == len(rows)} or of_seeds
        if whole:
            lines = np.stack([np.mean([line for _, line in measured], axis=0) for measured in whole.values()])
            auroc = {seed: float(np.mean([number for number, _ in measured])) for seed, measured in whole.items()}
            spread = lines.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros_like(GRID)
            count = sum(map(len, whole.values()))
            found.append(Curve(method, auroc, lines.mean(axis=0), spread, count, len(seeds) * len(rows)))
    if without:
        logger.warning(
            "%s: %d finished cells are of an earlier version and have kept no scores: remove their .json files below %s and run the table again",
            RECIPES[section.dataset].title,
            without,
            selection.output_dir / "cells" / selection.budget,
        )
    return found


def _read(path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as file:
            return file["scores"], file["labels"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} is damaged: remove it and the .json beside it, then its cell is run again") from error


def draw(table: Table, drawn: list[tuple[Section, list[Curve]]], selection: Selection, canvas) -> None:
    """A panel a section, on an empty figure of matplotlib: mean curves over the seeds, with a band of one standard deviation."""
    columns = min(len(drawn), COLUMNS)
    rows = -(-len(drawn) // columns)
    longest = max(len(lines) for _, lines in drawn)
    canvas.set_size_inches(4.6 * columns, (4.3 + 0.19 * longest) * rows)
    panels = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    for panel, (section, lines) in zip(panels, drawn, strict=False):  # the last panels may stay empty
        for curve in lines:
            trained, color = curve.method not in BASELINES, f"C{section.methods.index(curve.method) % 10}"
            missing = "" if curve.cells == curve.all_cells else f", {curve.cells} of {curve.all_cells} cells"
            title = section.titles.get(curve.method, METHODS[curve.method].title)
            panel.plot(
                [0, *GRID],
                [0, *curve.mean],
                "-" if trained else "--",
                color=color,
                linewidth=1.6 if trained else 1,
                label=f"{title}: {mean_and_std(curve.auroc)}{missing}",
            )
            if trained:
                low, high = (curve.mean - curve.std).clip(0, 1), (curve.mean + curve.std).clip(0, 1)
                panel.fill_between(GRID, low, high, color=color, alpha=0.12, linewidth=0)
        panel.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
        classes = f", mean of {len(section.rows)} classes" if len(section.rows) > 1 and selection.budget != "smoke" else ""
        panel.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
        panel.set_title(f"{RECIPES[section.dataset].title}{classes}", fontsize=10)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, title="AUROC", title_fontsize=7)
    canvas.suptitle(f"{table.id}: {table.title} (budget {selection.budget})", fontsize=10)
