"""The papers' pictures: galleries of dissolved images, the similarity matrices of DIA's loss, and the ROC curves of a table. A gallery trains the diffusion
models that it lacks."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState

from ..cards.figures import new_figure
from ..data import decode_image
from ..data.recipes import RECIPES, find_recipe
from ..dissolving import DISSOLVERS, DiffusionDissolver
from ..errors import InputError
from ..image_processing import AnomalyImageProcessor
from ..ops.contrastive import amplified_nt_xent
from ..visualization import image_grid, write_image
from . import roc
from .cells import Cell, Table
from .contrastive import BLUR_KERNELS
from .papers.dia import LARGE, MEDICAL
from .running import PENDING, Selection, load_data, quiet, run_cells
from .tables import TABLES

logger = logging.getLogger(__name__)

TIMESTEPS = (30, 80, 130, 230, 330, 430, 530)


@dataclass(frozen=True)
class Figure(ABC):
    """A picture.

    Attributes:
        id: paper/number.
        datasets: names of the recipes that it shows by default.
    """

    id: str
    title: str
    datasets: tuple[str, ...] = ()

    def models(self, dataset: str) -> tuple[str, ...]:
        """The datasets whose diffusion models it needs to show this one."""
        return ()

    def prepare(self, selection: Selection, command: list[str]) -> list:
        """Trains the diffusion models that are missing.

        Returns:
            What `draw` takes: the datasets that can be shown.

        Raises:
            InputError: none of the datasets is there, an unknown one is asked for, or methods are: a gallery has none.
        """
        selection.check()
        if selection.methods is not None:
            raise InputError(f"--methods: figure {self.id} is not of methods; leave it out")
        datasets = list(dict.fromkeys(find_recipe(name).name for name in selection.datasets or self.datasets))
        missing = {name: message for name in datasets if (message := selection.instructions(name)) is not None}
        if datasets and len(missing) == len(datasets):
            raise InputError(f"nothing can be drawn: {'; '.join(missing.values())}")
        for message in missing.values():
            logger.warning("Left out: %s", message)
        there = [name for name in datasets if name not in missing]
        cells = dict.fromkeys(dissolver_cell(model, selection) for name in there for model in self.models(name))
        run_cells([cell for cell in cells if selection.status(cell) == PENDING], selection, command, self.id)
        return there

    @abstractmethod
    def draw(self, prepared: list, selection: Selection) -> PIL.Image.Image:
        """The picture of what `prepare` gave."""


@dataclass(frozen=True)
class Gallery(Figure):
    """A normal and an anomalous image of each dataset, dissolved at ever larger t.

    Attributes:
        others: datasets by whose models the images are dissolved, too; then the anomalous one alone is shown.
    """

    others: tuple[str, ...] = ()

    def models(self, dataset):
        return tuple(dict.fromkeys((dataset, *self.others)))

    def draw(self, datasets, selection):
        rows, captions, titles = [], [], []
        for dataset in datasets:
            for model in (name for name in self.models(dataset) if selection.instructions(name) is None):
                dissolver = load_dissolver(model, selection)
                normal, anomalous = _examples(dataset, dissolver.unet.config.in_channels, selection)
                shown = {"normal": normal, "anomalous": anomalous}
                if self.others:
                    shown = {f"by the model of\n{RECIPES[model].title}": anomalous}
                for name, image in shown.items():
                    versions = {"original": image, **self.versions(image, dissolver, dataset)}
                    rows.append(list(versions.values()))
                    captions.append(f"{RECIPES[dataset].title}\n{name}{self.note(dataset)}")
                    titles = list(versions)
        return image_grid(rows, titles, captions)

    def versions(self, image: torch.Tensor, dissolver: DiffusionDissolver, dataset: str) -> dict[str, torch.Tensor]:
        """What is shown beside an image (C, H, W), by the title of its column."""
        dissolved = dissolver(image.expand(len(TIMESTEPS), -1, -1, -1), torch.tensor(TIMESTEPS))
        return {f"t = {t}": version for t, version in zip(TIMESTEPS, dissolved, strict=True)}

    def note(self, dataset: str) -> str:
        """What a row's caption ends with."""
        return ""


@dataclass(frozen=True)
class BlurGallery(Gallery):
    """The same images, blurred, and dissolved in the middle of the dataset's range of t."""

    def versions(self, image, dissolver, dataset):
        kernels = [(kind, kernel) for kind in ("gaussian", "median") for kernel in BLUR_KERNELS]
        blurred = {f"{kind} {kernel}": DISSOLVERS[kind](kernel_size=kernel)(image[None])[0] for kind, kernel in kernels}
        return blurred | {"diffusion": dissolver(image[None], torch.tensor([_middle(dataset)]))[0]}

    def note(self, dataset):
        return f", t = {_middle(dataset)}"


def _middle(dataset: str) -> int:
    return sum(RECIPES[dataset].timesteps) // 2


@dataclass(frozen=True)
class SimilarityMatrices(Figure):
    """Which pairs of views DIA's loss draws together and which it pushes apart, read off its gradient.

    Attributes:
        designs: of appendix C.2.
    """

    designs: tuple[str, ...] = ("a",)

    def draw(self, datasets, selection):
        figure = _canvas()
        from matplotlib.colors import ListedColormap

        shifts, images = 4, 2
        block = shifts * images
        figure.set_size_inches(6.4 * len(self.designs), 4.8)
        colors = ListedColormap(["#475467", "#eaecf0", "#b42318"])
        for panel, design in zip(figure.subplots(1, len(self.designs), squeeze=False)[0], self.designs, strict=True):
            panel.imshow(pair_signs(shifts, images, design).numpy(), cmap=colors, vmin=-1, vmax=1)
            panel.set_xticks([block * branch + (block - 1) / 2 for branch in range(3)], labels=["A", "B", "D, dissolved"])
            panel.set_yticks([block * branch + (block - 1) / 2 for branch in range(2)], labels=["A", "B"])
            panel.set_xticks([column - 0.5 for column in range(3 * block)], minor=True)
            panel.set_yticks([row - 0.5 for row in range(2 * block)], minor=True)
            panel.grid(which="minor", color="white", linewidth=0.6)
            panel.tick_params(which="both", length=0)
            for edge in (1, 2):
                panel.axvline(edge * block - 0.5, color="black", linewidth=1)
            panel.axhline(block - 0.5, color="black", linewidth=1)
            panel.set(title=f"design ({design})", ylabel="anchor")
        marks = {"positive": 2, "negative": 0, "not considered": 1}
        handles = [figure.axes[0].plot([], [], "s", color=colors(which))[0] for which in marks.values()]
        figure.legend(handles, marks, loc="outside lower center", ncols=3, frameon=False)
        figure.text(0.01, 0.02, f"{images} images, {shifts} shifts each", fontsize=8)
        return _picture(figure)


@dataclass(frozen=True)
class RocCurves(Figure):
    """ROC curves of a table's methods on each of its datasets, of the cells that are finished.

    Attributes:
        table: whose cells.
    """

    table: Table | None = None

    def prepare(self, selection, command):
        _canvas()  # a missing matplotlib is told first
        sections, methods = selection.sections(self.table), selection.methods_of(self.table)
        found = [(section, curves) for section in sections if (curves := roc.curves(section, methods, selection))]
        if not found:
            raise InputError(
                f"nothing can be drawn: no selected cell of {self.table.id} at budget {selection.budget} has left scores; "
                f"run --table {self.table.id} first"
            )
        return found

    def draw(self, found, selection):
        figure = _canvas()
        roc.draw(self.table, found, selection, figure)
        return _picture(figure)


def _canvas():
    """An empty figure of matplotlib. Raises InputError: it is missing."""
    return new_figure("this picture needs", dpi=130)


def _picture(figure) -> PIL.Image.Image:
    figure.canvas.draw()
    return PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def pair_signs(shifts: int, images: int, design: str) -> torch.Tensor:
    """What `amplified_nt_xent` makes of each pair of an anchor and another view: 1 it draws them together, −1 it pushes them apart, 0 nothing.

    Args:
        design: "a" or "b", see `DIAConfig.similarity_design`.

    Returns:
        (2·K·B, 3·K·B): anchors in A and B; views in A, B and D, by shift and then image.
    """
    views = torch.eye(3 * shifts * images, dtype=torch.double).unflatten(0, (3, shifts, images)).requires_grad_()
    amplified_nt_xent(*views, exclude_twins=design == "b").backward()
    # All views are orthogonal: the derivative of view i along view j is that of their similarity.
    signs = -views.grad.flatten(0, 2).sign()
    return signs[: 2 * shifts * images]


_FOREIGN = ("pneumonia_mnist", "cifar_10")
_FIGURES: tuple[Figure, ...] = (
    Gallery("dia/1", "Images dissolved at ever larger t", MEDICAL),
    SimilarityMatrices("dia/3", "The target similarity matrix"),
    Gallery("dia/4", "Dissolving with the models of other datasets", LARGE, others=("cifar_10",)),
    BlurGallery("dia/5", "Blur beside diffusion", MEDICAL[:4]),
    SimilarityMatrices("dia/6", "The two designs of the similarity matrix", designs=("a", "b")),
    # Which dataset is in which of the last five is lost in the text at hand: the order is Table 1's.
    *(
        Gallery(f"dia/{number}", f"{RECIPES[dataset].title} dissolved with the models of other datasets", (dataset,), others=_FOREIGN)
        for number, dataset in enumerate(MEDICAL[1:], 7)
    ),
    *(
        RocCurves(f"roc/{table.id}", f"ROC curves of {table.id}", table=table)
        for table in TABLES.values()
        if table.sections and not table.is_curve
    ),
)
FIGURES = {figure.id: figure for figure in _FIGURES}


def find_figure(figure_id: str) -> Figure:
    """The figure of this id.

    Raises:
        InputError: there is none; names those there are.
    """
    if figure_id not in FIGURES:
        papers = [name for name in FIGURES if not name.startswith("roc/")]
        curves = [name for name in FIGURES if name.startswith("roc/")]
        raise InputError(
            f"there is no figure {figure_id!r}; the figures: {', '.join(papers)}; ROC curves of a table's finished cells: {', '.join(curves)}"
        )
    return FIGURES[figure_id]


def write_figure(figure: Figure, selection: Selection, command: list[str]) -> list[Path]:
    """Draws a figure as `figure-<id>.png` in the output folder, of the datasets that are there; a gallery trains the diffusion models that are missing.

    Args:
        selection: of a gallery the datasets may be any recipes, and of the seeds the first counts; of ROC curves it is as for their table.
        command: the command line, for the results of the training.

    Raises:
        InputError: see `Figure.prepare`; ROC curves: no selected cell has left scores, or the table does not know what is selected.
    """
    there = figure.prepare(selection, command)
    path = Path(selection.output_dir, f"figure-{figure.id.replace('/', '-')}.png")
    if PartialState().is_main_process:
        with quiet():
            picture = figure.draw(there, selection)
        write_image(picture, path)
    return [path]


def dissolver_cell(dataset: str, selection: Selection) -> Cell:
    """The cell that trains the diffusion model of a dataset, with its first class as the normal one."""
    recipe = RECIPES[dataset]
    return Cell(dataset, recipe.normal_labels[0], recipe.protocol, None, "dissolver", selection.seeds[0], selection.budget)


def load_dissolver(dataset: str, selection: Selection) -> DiffusionDissolver:
    """What that cell has left."""
    return DiffusionDissolver.from_pretrained(selection.folder(dissolver_cell(dataset, selection)))


def _examples(dataset: str, num_channels: int, selection: Selection) -> list[torch.Tensor]:
    """The first normal and the first anomalous test image, (C, H, W) each."""
    data = load_data(dissolver_cell(dataset, selection), selection)
    processor = AnomalyImageProcessor.for_images(data.processor.size["height"], num_channels)
    labels, test = data.splits.test["label"][:], data.splits.test
    images = [decode_image(test[labels.index(label)]["image"], f"a test image of {dataset}") for label in (0, 1)]
    return list(processor(images=images, return_tensors="pt")["pixel_values"])
