"""What each table consists of: datasets × rows × methods × seeds, and the paper's numbers. A table is declared here and nowhere else."""

import random
from dataclasses import dataclass, field
from pathlib import PurePath

from ..data.recipes import RECIPES
from ..errors import InputError
from .methods import BASELINES, BUDGETS

MEAN = "mean"  # the row below the others
SHARED_AE_PAPER = "Jia & Liu, Anomaly detection in images with shared autoencoders, Frontiers in Neurorobotics 16, 2023"
ADDP_PAPER = "Ge, Li & Zhang 2023 (denoising pretraining)"


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
        with_mean: whether a mean over the rows makes sense.
    """

    dataset: str
    protocol: str
    rows: tuple[Row, ...]
    methods: tuple[str, ...]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
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
    """

    id: str
    title: str
    paper: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    is_curve: bool = False


def class_rows(dataset: str, labels: tuple[str, ...] | None = None) -> tuple[Row, ...]:
    """Every class of a dataset in turn as the normal one."""
    classes = RECIPES[dataset].classes
    labels = RECIPES[dataset].normal_labels if labels is None else labels
    return tuple(Row(label if classes[label] == label else f"{label} {classes[label]}", label) for label in labels)


def image_rows(normal_label: str) -> tuple[Row, ...]:
    """Ever more training images of one normal class."""
    numbers = (16, 64, 256, None)
    return tuple(Row("all" if number is None else str(number), normal_label, number) for number in numbers)


def of_digits(*numbers: float) -> dict[str, float]:
    """A line of Table 2: the digits 0 to 9, and their mean."""
    return dict(zip((*"0123456789", MEAN), numbers, strict=True))


SHARED_AE = ("shared_ae", *BASELINES)
COIL_100_CLASSES = tuple(str(number) for number in sorted(random.Random(0).sample(range(1, 101), 30)))  # which the paper drew is not known

_TABLES = (
    Table(
        id="shared_ae/1",
        title="SharedAE: 80 % of the normal class train; 20 % and as many anomalies test",
        paper=f"{SHARED_AE_PAPER}, Table 1, which gives means over the classes only",
        sections=(
            Section(
                "mnist",
                "balanced",
                class_rows("mnist"),
                SHARED_AE,
                paper={"SharedAE, paper": {MEAN: 0.992}, "AnoNAGN, their best competitor": {MEAN: 0.985}},
            ),
            Section(
                "fashion_mnist",
                "balanced",
                class_rows("fashion_mnist"),
                SHARED_AE,
                paper={"SharedAE, paper": {MEAN: 0.997}, "AnoNAGN, their best competitor": {MEAN: 0.995}},
            ),
            Section(
                "coil_100",
                "balanced",
                class_rows("coil_100", COIL_100_CLASSES),
                SHARED_AE,
                paper={"SharedAE, paper": {MEAN: 1.000}, "PIAD and AnoNAGN, their best competitors": {MEAN: 1.000}},
            ),
        ),
        notes=("On COIL-100 the paper draws 30 classes and does not name them; here 30 are drawn once for all.",),
    ),
    Table(
        id="shared_ae/2",
        title="SharedAE on MNIST: its own split, all classes of the test split",
        paper=f"{SHARED_AE_PAPER}, Table 2",
        sections=(
            Section(
                "mnist",
                "official",
                class_rows("mnist"),
                SHARED_AE,
                paper={
                    "SharedAE, paper": of_digits(0.986, 0.999, 0.999, 0.999, 0.988, 0.999, 0.998, 0.992, 0.979, 0.999, 0.994),
                    "ADDPA, their best competitor": of_digits(0.997, 0.999, 0.986, 0.984, 0.964, 0.983, 0.996, 0.989, 0.976, 0.981, 0.986),
                },
            ),
        ),
    ),
    Table(
        id="shared_ae/5",
        title="SharedAE on MNIST: what its parts add",
        paper=f"{SHARED_AE_PAPER}, Table 5, which gives means only, and none for its first case, autoencoders alone",
        sections=(
            Section(
                "mnist",
                "official",
                class_rows("mnist"),
                ("autoencoder", "shared_ae_one", "shared_ae_two", *SHARED_AE),
                paper={
                    "one EDE, paper": {MEAN: 0.961},
                    "two EDEs, paper": {MEAN: 0.974},
                    "two EDEs, adversarial, paper": {MEAN: 0.989},
                },
            ),
        ),
        notes=("The paper does not say which of its two protocols Table 5 follows: here it is Table 2's.",),
    ),
    Table(
        id="shared_ae/extra",
        title="SharedAE where the paper has no number: own splits of Fashion-MNIST and PneumoniaMNIST",
        paper="none",
        sections=(
            Section("fashion_mnist", "official", class_rows("fashion_mnist"), SHARED_AE),
            Section("pneumonia_mnist", "official", class_rows("pneumonia_mnist"), SHARED_AE, with_mean=False),
        ),
    ),
    Table(
        id="addp/1",
        title="Denoising pretraining: AUROC against the number of training images",
        paper=f"{ADDP_PAPER}: the tables are not available",
        sections=tuple(
            Section(
                dataset,
                protocol,
                image_rows("0"),
                ("addp_random", "addp_random_longer", "addp_encoder_decoder", "addp_digits", "addp_decoder", *BASELINES),
                with_mean=False,
                row_title="training images",
            )
            for dataset, protocol in (("pneumonia_mnist", "official"), ("fashion_mnist", "balanced"))
        ),
        notes=(
            "On Fashion-MNIST class 0, T-shirt, is the normal one.",
            "The first stage denoises the same training images, in as many steps as the second takes.",
            "Where only the decoder is pretrained, the encoder, frozen meanwhile, comes from denoising scikit-learn's digits.",
        ),
        is_curve=True,
    ),
)
TABLES = {table.id: table for table in _TABLES}


def find_table(table_id: str) -> Table:
    """The table of this id.

    Raises:
        InputError: there is none; names those there are.
    """
    if table_id not in TABLES:
        raise InputError(f"there is no table {table_id!r}; the tables: {', '.join(TABLES)}")
    return TABLES[table_id]
