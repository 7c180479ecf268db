"""Runs the cells of a table, one after another in this process; every finished one is a JSON file and is not run again."""

import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

from accelerate import PartialState

from ..data.recipes import RECIPES
from ..data.sources import dataset_label
from ..errors import InputError
from ..files import write_json
from ..image_processing import AnomalyImageProcessor
from ..training.runs import shrink_training_images
from ..version import __version__
from .budgets import BUDGETS, SCORES_FILE, CellData
from .cells import Cell, Section, Table
from .methods import METHODS

logger = logging.getLogger(__name__)

FINISHED, PENDING, ABSENT, NOT_IMPLEMENTED = "finished", "not run", "no data", "not implemented"
TOO_LARGE = "needs a larger budget"


@dataclass(frozen=True)
class Selection:
    """Which cells of a table are run, and where.

    Attributes:
        datasets, methods: names; None: all of the table's.
        seeds: of initialisation, batches and splits.
        budget: a name in BUDGETS.
        shard: "i/n", every n-th cell from the i-th on, i from 1.
        output_dir: results lie in its `cells/`.
        data_dir: see `DatasetRecipe.locate`.
    """

    output_dir: Path
    datasets: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: str = "laptop"
    shard: str = "1/1"
    data_dir: str | None = None

    def cells(self, table: Table) -> list[Cell]:
        """The selected cells, those with the same data one after another, first the ones that others require; these may be in several shards.

        Raises:
            InputError: an unknown dataset, method, budget or shard, or no seed.
        """
        sections, methods = self.sections(table), self.methods_of(table)
        cells = [cell for section in sections for cell in section.cells(methods, self.seeds, self.budget)]
        # A shard takes its part of every method, the slow ones too; only then do the cells of the same data come together.
        cells = part_of(cells, self.shard)
        required = dict.fromkeys(other for cell in cells for other in METHODS[cell.method].requires(cell))
        return sorted([*required, *cells], key=lambda cell: [*map(str, _data_key(cell)), cell not in required])

    def sections(self, table: Table) -> list[Section]:
        """Those of the selected datasets.

        Raises:
            InputError: an unknown dataset, budget or seed.
        """
        datasets = _known("datasets", self.datasets, [section.dataset for section in table.sections], table)
        self.check()
        return [section for section in table.sections if section.dataset in datasets]

    def methods_of(self, table: Table) -> tuple[str, ...]:
        """The selected methods. Raises InputError: one that the table has not."""
        return _known("methods", self.methods, [method for section in table.sections for method in section.methods], table)

    def check(self) -> None:
        """Raises InputError of an unknown budget, or of bad seeds."""
        if self.budget not in BUDGETS:
            raise InputError(f"there is no budget {self.budget!r}; the budgets: {', '.join(BUDGETS)}")
        check_seeds(self.seeds)

    def folder(self, cell: Cell) -> Path:
        """What a cell leaves for those that require it."""
        return Path(self.output_dir, "cells", cell.name)

    def result_file(self, cell: Cell) -> Path:
        return self.folder(cell).with_suffix(".json")

    def scores_file(self, cell: Cell) -> Path:
        """The scores of its test images, see `write_scores`; cells of earlier versions have none."""
        return self.folder(cell).with_suffix(".npz")

    def result(self, cell: Cell) -> dict | None:
        """A finished cell's result; None if there is none, or if it is of other settings.

        Raises:
            InputError: the file is no JSON.
        """
        path, method = self.result_file(cell), METHODS[cell.method]
        if not path.is_file() or (method.keeps_folder and not self.folder(cell).is_dir()):
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            current = result["settings"] == method.settings(cell)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: remove it, then its cell is run again") from error
        return result if current else None

    def status(self, cell: Cell) -> str:
        if not METHODS[cell.method].is_implemented:
            return NOT_IMPLEMENTED
        if self.is_too_large(cell.method):
            return TOO_LARGE
        if self.result(cell) is not None:
            return FINISHED
        return PENDING if self.instructions(cell.dataset) is None else ABSENT

    def is_too_large(self, method: str) -> bool:
        """Whether the budget shrinks images to less than the method needs."""
        least = METHODS[method].least_image_size
        return BUDGETS[self.budget].image_size(least) < least

    def instructions(self, dataset: str) -> str | None:
        """How to get a dataset that is not there; None if it is."""
        try:
            RECIPES[dataset].locate(self.data_dir)
        except InputError as error:
            return str(error)
        return None


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raises InputError: no seed, one twice, or one that numpy does not take."""
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds takes different numbers from 0 to {2**32 - 1}, got {list(seeds)}")


def part_of(items: list, shard: str) -> list:
    """Every n-th of the items, from the i-th on. Raises InputError: `shard` is not "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise InputError(f"--shard takes i/n with i from 1 to n, such as 1/4, got {shard!r}")
    return items[i - 1 :: n]


def _known(what: str, asked: tuple[str, ...] | None, there: list[str], table: Table) -> tuple[str, ...]:
    there = tuple(dict.fromkeys(there))
    for name in asked or ():
        if name not in there:
            raise InputError(f"table {table.id} has no {name!r} among its {what}: {', '.join(there)}")
    return there if asked is None else tuple(asked)


def describe(table: Table, selection: Selection) -> str:
    """The selected cells and how each stands, a line each."""
    cells = selection.cells(table)
    status = [selection.status(cell) for cell in cells]
    counts = [f"{status.count(which)} {which}" for which in dict.fromkeys(status)]
    lines = [f"{which:15} {cell.name}" for which, cell in zip(status, cells, strict=True)]
    return "\n".join([f"{table.id}: {table.title}; {len(lines)} cells: {', '.join(counts)}", *lines])


def run_table(table: Table, selection: Selection, command: list[str]) -> None:
    """Runs the selected cells that are not finished.

    Args:
        command: the command line, for the results.

    Raises:
        InputError: of a bad selection; or there are cells, but the data of none of them; or what ended a cell.
    """

    cells = selection.cells(table)
    status = {cell: selection.status(cell) for cell in cells}
    absent = dict.fromkeys(cell.dataset for cell in cells if status[cell] == ABSENT)
    messages = [selection.instructions(dataset) for dataset in absent]
    if messages and not {PENDING, FINISHED} & set(status.values()):
        raise InputError(f"nothing can be run: {'; '.join(messages)}")
    for message in messages:
        logger.warning("Left out: %s", message)
    run_cells([cell for cell in cells if status[cell] == PENDING], selection, command, table.id)


def run_cells(cells: list[Cell], selection: Selection, command: list[str], title: str) -> None:
    """Runs cells that are pending, in this order, with a bar of this title."""
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    process = PartialState()
    process.wait_for_everyone()  # nobody finishes a cell before everybody has seen what is to do
    with logging_redirect_tqdm():
        progress = tqdm(cells, desc=title, unit="cell", disable=not process.is_main_process or not cells)
        for cell in progress:
            progress.set_postfix_str(f"{cell.dataset} {cell.normal_label} {cell.method} seed {cell.seed}")
            run_cell(cell, selection, command)


def run_cell(cell: Cell, selection: Selection, command: list[str]) -> None:
    """Runs one cell and writes its result; the detector itself is not kept.

    Raises:
        InputError: there is no AUROC to be had, or anything that ends the training; names the cell.
    """
    process, method, recipe = PartialState(), METHODS[cell.method], RECIPES[cell.dataset]
    shard = selection.shard.replace("/", "-of-")  # others that need the same cell may be at work on it
    folder = Path(selection.output_dir, "work", "-".join([*cell.name.parts, shard]))
    try:
        with quiet():
            data = load_data(cell, selection)
            required = [selection.folder(other) for other in method.requires(cell)]
            results = method.run(cell, data, folder, command, required)
    except InputError as error:
        raise InputError(f"cell {cell.name}: {error}") from error
    process.wait_for_everyone()
    if process.is_main_process:
        path = selection.result_file(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        if (folder / SCORES_FILE).is_file():  # before the result, without which the cell is not finished
            os.replace(folder / SCORES_FILE, selection.scores_file(cell))
        if method.keeps_folder and selection.result(cell) is None:  # else another shard was faster, and may be reading what it left
            kept = selection.folder(cell)
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(kept)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # somebody else's cell is at work there, or there never was one
            folder.parent.rmdir()
        record = {
            **results,
            "cell": asdict(cell),
            "protocol": data.protocol,
            "image_size": data.processor.size["height"],
            "division": asdict(data.splits.division),
            "dataset": dataset_label(data.splits.source),
            "subset": recipe.subset(data.splits.source),
            "settings": method.settings(cell),
            "processes": process.num_processes,
            "command": command,
            "hf_anomaly_version": __version__,
        }
        write_json(path, record)
    process.wait_for_everyone()


def _data_key(cell: Cell) -> tuple:
    return cell.dataset, cell.protocol, cell.normal_label, cell.max_train_images, cell.seed, cell.budget


def load_data(cell: Cell, selection: Selection) -> CellData:
    """A cell's data; read once for cells in a row that share it."""
    return _load(selection.data_dir, *_data_key(cell))


@lru_cache(maxsize=1)
def _load(
    data_dir: str | None, dataset: str, protocol: str, normal_label: str, max_train_images: int | None, seed: int, budget: str
) -> CellData:
    recipe = RECIPES[dataset]
    load = partial(recipe.load, data_dir, normal_label, max_train_images=max_train_images, seed=seed)
    splits = load(protocol=protocol)
    if protocol == "official" and splits.test is None:
        protocol = "stratified"
        splits = load(protocol=protocol)
    if splits.test_missing_reason:
        raise InputError(splits.test_missing_reason)
    image_size = BUDGETS[budget].image_size(recipe.image_size)
    processor = AnomalyImageProcessor.for_images(image_size, splits.num_channels)
    return CellData(shrink_training_images(splits, processor), processor, protocol)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed within but errors: Trainer prints, and the libraries log and draw bars into the one of the table."""
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    ours = logging.getLogger("hf_anomaly")
    level, verbosity = ours.level, transformers_logging.get_verbosity()
    enable = {
        transformers_logging.enable_progress_bar: transformers_logging.is_progress_bar_enabled(),
        datasets.enable_progress_bars: not datasets.are_progress_bars_disabled(),
        enable_progress_bars: not are_progress_bars_disabled(),  # of downloads, which transformers hides with its own
    }
    ours.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        ours.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        for show, were_shown in enable.items():
            if were_shown:
                show()
