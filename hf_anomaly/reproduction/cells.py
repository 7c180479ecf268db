"""What a table consists of: datasets × rows × methods × seeds, and the paper's numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath

from ..data.recipes import RECIPES
from .budgets import BUDGETS

MEAN = "mean"  # the row below the others
Number = float | tuple[float, float]  # of a paper: the mean, or mean and standard deviation


@dataclass(frozen=True)
class Cell:
    """One run: it trains, or fits, one method once."""

    dataset: str
    normal_label: str
    protocol: str
    max_train_images: int | None
    method: str
    seed: int
    budget: str

    @property
    def name(self) -> PurePath:
        """Where its files lie, below a folder. Tables that share a cell share its result."""
        images = "" if self.max_train_images is None else f"-{self.max_train_images}_images"
        return PurePath(self.budget, f"{self.dataset}-{self.protocol}{images}", self.normal_label, self.method, f"seed{self.seed}")


@dataclass(frozen=True)
class Row:
    """What varies down a section: the normal class, or the number of training images."""

    title: str
    normal_label: str
    max_train_images: int | None = None


@dataclass(frozen=True)
class Section:
    """The part of a table that belongs to one dataset under one protocol.

    Attributes:
        protocol: as in `load_one_class`. "official" becomes "stratified" for a source without a test split, and the report says so.
        methods: names in METHODS, the columns.
        paper: the paper's numbers, AUROC: column title → row title, or "mean" → number.
        paper_of_method: the same for a section with a single row: method → number. Its report has a line a method.
        titles: what a method is called here, if not by its own title.
        with_mean: whether a mean over the rows makes sense.
    """

    dataset: str
    protocol: str
    rows: tuple[Row, ...]
    methods: tuple[str, ...]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    paper_of_method: dict[str, Number] | None = None
    titles: dict[str, str] = field(default_factory=dict)
    with_mean: bool = True
    row_title: str = "normal class"

    def cell(self, row: Row, method: str, seed: int, budget: str) -> Cell:
        return Cell(self.dataset, row.normal_label, self.protocol, row.max_train_images, method, seed, budget)

    def cells(self, methods: tuple[str, ...], seeds: tuple[int, ...], budget: str) -> list[Cell]:
        """By method, then row, then seed; no more rows and seeds than the budget allows."""
        limits = BUDGETS[budget]
        return [
            self.cell(row, method, seed, budget)
            for method in self.methods
            if method in methods
            for row in self.rows[: limits.max_rows]
            for seed in seeds[: limits.max_seeds]
        ]


@dataclass(frozen=True)
class Table:
    """A table of a paper, or one of our own.

    Attributes:
        id: paper/number.
        paper: where the paper's numbers are from.
        notes: what a reader has to know, a sentence each.
        is_curve: whether its rows are points on a logarithmic axis of training images, to be drawn.
        computed: gives the lines, title → entry, of a table that has no cells but is computed.
    """

    id: str
    title: str
    paper: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    is_curve: bool = False
    computed: Callable[[], list[dict[str, str]]] | None = None


def class_rows(dataset: str, labels: tuple[str, ...] | None = None) -> tuple[Row, ...]:
    """Every class of a dataset in turn as the normal one."""
    classes = RECIPES[dataset].classes
    labels = RECIPES[dataset].normal_labels if labels is None else labels
    return tuple(Row(label if classes[label] == label else f"{label} {classes[label]}", label) for label in labels)
