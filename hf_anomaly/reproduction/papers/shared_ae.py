"""The tables of SharedAE."""

import random

from ..cells import MEAN, Section, Table, class_rows
from ..methods import BASELINES

PAPER = "Jia & Liu, Anomaly detection in images with shared autoencoders, Frontiers in Neurorobotics 16, 2023"
SHARED_AE = ("shared_ae", *BASELINES)
COIL_100_CLASSES = tuple(str(number) for number in sorted(random.Random(0).sample(range(1, 101), 30)))  # which the paper drew is not known


def of_means(dataset: str, ours: float, competitor: str, theirs: float, labels: tuple[str, ...] | None = None) -> Section:
    """A part of Table 1, which has a mean over the classes alone."""
    paper = {"SharedAE, paper": {MEAN: ours}, competitor: {MEAN: theirs}}
    return Section(dataset, "balanced", class_rows(dataset, labels), SHARED_AE, paper=paper)


def of_classes(dataset: str, ours: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[Section]:
    """The one part of each of Tables 2 to 4: numbers of the classes in order, and their mean."""
    rows = class_rows(dataset)
    lines = {"SharedAE, paper": ours, "ADDPA, their best competitor": theirs}
    paper = {title: dict(zip((*(row.title for row in rows), MEAN), numbers, strict=True)) for title, numbers in lines.items()}
    return (Section(dataset, "official", rows, SHARED_AE, paper=paper),)


TABLES = (
    Table(
        id="shared_ae/1",
        title="SharedAE: 80 % of the normal class train; 20 % and as many anomalies test",
        paper=f"{PAPER}, Table 1, which gives means over the classes only",
        sections=(
            of_means("mnist", 0.992, "AnoNAGN, their best competitor", 0.985),
            of_means("fashion_mnist", 0.997, "AnoNAGN, their best competitor", 0.995),
            of_means("coil_100", 1.000, "PIAD and AnoNAGN, their best competitors", 1.000, COIL_100_CLASSES),
        ),
        notes=("On COIL-100 the paper draws 30 classes and does not name them; here 30 are drawn once for all.",),
    ),
    Table(
        id="shared_ae/2",
        title="SharedAE on MNIST: its own split, all classes of the test split",
        paper=f"{PAPER}, Table 2",
        sections=of_classes(
            "mnist",
            (0.986, 0.999, 0.999, 0.999, 0.988, 0.999, 0.998, 0.992, 0.979, 0.999, 0.994),
            (0.997, 0.999, 0.986, 0.984, 0.964, 0.983, 0.996, 0.989, 0.976, 0.981, 0.986),
        ),
    ),
    Table(
        id="shared_ae/3",
        title="SharedAE on CIFAR-10: its own split, all classes of the test split",
        paper=f"{PAPER}, Table 3",
        sections=of_classes(
            "cifar_10",
            (0.925, 0.867, 0.757, 0.894, 0.940, 0.754, 0.963, 0.818, 0.917, 0.834, 0.867),
            (0.865, 0.922, 0.768, 0.587, 0.851, 0.777, 0.889, 0.891, 0.914, 0.922, 0.839),
        ),
    ),
    Table(
        id="shared_ae/4",
        title="SharedAE on CIFAR-100: one subclass against the four others of its superclass",
        paper=f"{PAPER}, Table 4",
        sections=of_classes(
            "cifar_100_subclasses",
            (0.931, 0.872, 0.809, 0.857, 0.938, 0.739, 0.897, 0.819, 0.961, 0.871, 0.869),
            (0.841, 0.893, 0.714, 0.761, 0.855, 0.711, 0.914, 0.823, 0.924, 0.917, 0.835),
        ),
    ),
    Table(
        id="shared_ae/5",
        title="SharedAE on MNIST: what its parts add",
        paper=f"{PAPER}, Table 5, which gives means only, and none for its first case, autoencoders alone",
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
)
