"""What the finished cells say: a Markdown table beside the paper's numbers, every cell as CSV, and the picture of a curve."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

from ..cards.card import shown_command
from ..cards.figures import new_figure
from ..data.recipes import RECIPES
from ..files import csv_text, markdown_table, replacing, write_file
from .budgets import BUDGETS
from .cells import MEAN, Number, Row, Section, Table
from .methods import BASELINES, METHODS
from .running import ABSENT, FINISHED, NOT_IMPLEMENTED, PENDING, TOO_LARGE, Selection

NOTHING = "–"
CSV_FIELDS = (
    "table", "dataset", "protocol", "normal_label", "max_train_images", "method", "budget", "seed", "status", "auroc", "average_precision",
    "fpr_at_95_tpr", "num_train", "num_calibration", "num_normal", "num_anomalous", "steps", "seconds", "split_hash", "command",
)  # fmt: skip


def write_table(table: Table, selection: Selection, command: list[str], *, draw: bool = True) -> list[Path]:
    """Writes `<table>.md`, `<table>.csv` and, of a curve, `<table>.png` into the output folder, from all finished cells of the whole table, whichever run
    left them; of the selection only the budget and the seeds count.

    Returns:
        The files written. There is no picture before a method has two points.

    Raises:
        InputError: the picture needs matplotlib, which is missing. The other files are written by then.
    """
    stem = Path(selection.output_dir, table.id.replace("/", "-"))
    pages = (markdown(table, selection, command), cells_csv(table, selection)) if table.computed is None else _computed(table, command)
    files = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    for path, text in zip(files, pages, strict=True):
        write_file(path, text)
    return [*files, *(plot(table, selection, stem.with_suffix(".png")) if draw and table.is_curve else [])]


def _computed(table: Table, command: list[str]) -> tuple[str, str]:
    """Markdown and CSV of a table without cells."""
    entries = table.computed()
    lines = [f"# {table.id}: {table.title}", "", f"The paper: {table.paper}.", *table.notes, ""]
    lines += markdown_table(list(entries[0]), [list(line.values()) for line in entries])
    return "\n".join([*lines, "", *_command_lines(command)]), csv_text(entries)


def _command_lines(command: list[str]) -> list[str]:
    return ["The command:", "", f"    python {shown_command(command)}", ""]


def _seeds(selection: Selection) -> tuple[int, ...]:
    return selection.seeds[: BUDGETS[selection.budget].max_seeds]


def _results(section: Section, row: Row, method: str, selection: Selection) -> dict[int, dict]:
    """The finished results by seed."""
    found = {seed: selection.result(section.cell(row, method, seed, selection.budget)) for seed in _seeds(selection)}
    return {seed: result for seed, result in found.items() if result is not None}


def mean_and_std(values: dict[int, float], seeds: tuple[int, ...] = ()) -> str:
    """`0.987 ± 0.004`: the mean over seeds and their sample standard deviation; where seeds are missing, which ones it is of."""
    numbers = list(values.values())
    text = f"{np.mean(numbers):.3f}" + (f" ± {np.std(numbers, ddof=1):.3f}" if len(numbers) > 1 else "")
    missing = set(seeds) - set(values)
    return f"{text} (seed {', '.join(map(str, values))} only)" if missing else text


def _entry(method: str, selection: Selection, values: dict[int, float]) -> str:
    if not METHODS[method].is_implemented:
        return NOT_IMPLEMENTED
    if selection.is_too_large(method):
        return TOO_LARGE
    return mean_and_std(values, _seeds(selection)) if values else PENDING


def _means(rows: list[dict[int, dict]]) -> dict[int, float]:
    """For every seed the mean AUROC over the rows, if all of them are there: a mean over some would not compare."""
    return {seed: float(np.mean([results[seed]["auroc"] for results in rows])) for seed in rows[0] if all(seed in r for r in rows)}


def _joined(results: list[dict], text: Callable[[dict], str]) -> str:
    return ", ".join(dict.fromkeys(map(text, results))) or NOTHING


def markdown(table: Table, selection: Selection, command: list[str]) -> str:
    """The report: for every section a table with a line a row, the paper's columns, ours, the number of images and the split hashes."""
    lines = [
        f"# {table.id}: {table.title}",
        "",
        f"AUROC; ours: mean ± standard deviation over the seeds {', '.join(map(str, _seeds(selection)))}.",
    ]
    lines += [f"Budget {BUDGETS[selection.budget].title}. The paper: {table.paper}.", *table.notes, ""]
    for section in table.sections:
        lines += [*_section_lines(section, selection), ""]
    return "\n".join([*lines, *_command_lines(command)])


def _section_lines(section: Section, selection: Selection) -> list[str]:
    everything = {(row, method): _results(section, row, method, selection) for row in section.rows for method in section.methods}
    finished = [result for results in everything.values() for result in results.values()]
    protocol = _joined(finished, lambda result: result["protocol"]) if finished else section.protocol
    title = RECIPES[section.dataset].title
    layout = _lines_by_row if section.paper_of_method is None else _lines_by_method
    lines = [f"## {title}, protocol {protocol}", "", *layout(section, selection, everything)]
    if any(result["protocol"] != section.protocol for result in finished):
        lines.append(
            f"This copy has no test split: protocol {protocol} stands in for {section.protocol}, and the numbers are not the paper's setting."
        )
    if subsets := [result for result in finished if result["subset"]]:
        lines.append(f"The copy of {title} is not whole: {_joined(subsets, lambda result: result['subset'])}.")
    if (instructions := selection.instructions(section.dataset)) is not None:
        lines.append(f"{ABSENT.capitalize()}: {instructions}")
    return lines


def _data_entries(results: list[dict]) -> list[str]:
    """Images of training and test, and the splits."""
    return [
        _joined(results, lambda result: f"{result['num_train']} + {result['num_calibration']}"),
        _joined(results, lambda result: f"{result['num_normal']} + {result['num_anomalous']}"),
        _joined(results, lambda result: result["split_hash"][:8]),
    ]


def _lines_by_method(section: Section, selection: Selection, everything: dict) -> list[str]:
    """A line a method, of a section with one row."""
    (row,) = section.rows
    titles = ["", "paper", "AUROC", "average precision", "FPR at 95 % TPR", "steps", "seconds a cell"]
    rows = []
    finished = [result for method in section.methods for result in everything[row, method].values()]
    for method in section.methods:
        of_seeds, paper = everything[row, method], section.paper_of_method.get(method)
        entries = [section.titles.get(method, METHODS[method].title), NOTHING if paper is None else _printed(paper)]
        for measure in ("auroc", "average_precision", "fpr_at_95_tpr"):
            entries.append(_entry(method, selection, {seed: result[measure] for seed, result in of_seeds.items()}))
        results = list(of_seeds.values())
        entries.append(_joined(results, lambda result: str(result["steps"])))
        entries.append(f"{np.mean([result['seconds'] for result in results]):.0f}" if results else NOTHING)
        rows.append(entries)
    lines = [*markdown_table(titles, rows), ""]
    if finished:
        train, test, hashes = _data_entries(finished)
        lines.append(f"Images: {train} (train + calibration), {test} (test: normal + anomalous); split hashes {hashes}.")
    cells = [section.cell(row, method, seed, selection.budget) for method in section.methods for seed in _seeds(selection)]
    required = dict.fromkeys(other for cell in cells for other in METHODS[cell.method].requires(cell))
    for method in dict.fromkeys(cell.method for cell in required):
        if results := [result for cell in required if cell.method == method and (result := selection.result(cell))]:
            seconds = np.mean([result["seconds"] for result in results])
            lines.append(
                f"Shared by the cells of a seed: {METHODS[method].title}, {results[0]['steps']} steps on {results[0]['num_train']} images, "
                f"{results[0]['num_parameters'] / 1e6:.2f} M parameters, {seconds:.0f} s."
            )
    return lines


def _printed(number: Number) -> str:
    return f"{number[0]:.3f} ± {number[1]:.2f}" if isinstance(number, tuple) else f"{number:.3f}"


def _lines_by_row(section: Section, selection: Selection, everything: dict) -> list[str]:
    """A line a row, a column a method."""
    finished = [result for results in everything.values() for result in results.values()]
    titles = [section.row_title, *section.paper, *(METHODS[method].title for method in section.methods)]
    titles += ["train + calibration", "test: normal + anomalous", "split hashes"]
    rows = []
    instructions = selection.instructions(section.dataset)
    for row in section.rows if finished or instructions is None else ():  # without data the mean's row says it all
        of_row = [result for method in section.methods for result in everything[row, method].values()]
        entries = [f"{numbers[row.title]:.3f}" if row.title in numbers else NOTHING for numbers in section.paper.values()]
        for method in section.methods:
            values = {seed: result["auroc"] for seed, result in everything[row, method].items()}
            entries.append(_entry(method, selection, values))
        entries += _data_entries(of_row)
        rows.append([row.title, *entries])
    if section.with_mean:
        entries = [f"**{numbers[MEAN]:.3f}**" if MEAN in numbers else NOTHING for numbers in section.paper.values()]
        entries += [_entry(method, selection, _means([everything[row, method] for row in section.rows])) for method in section.methods]
        rows.append([MEAN, *entries, NOTHING, NOTHING, NOTHING])
    lines = [*markdown_table(titles, rows), ""]
    for method in section.methods:
        results = [result for row in section.rows for result in everything[row, method].values()]
        if steps := [result["steps"] for result in results if result["steps"]]:
            steps = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
            seconds = np.mean([result["seconds"] for result in results])
            lines.append(f"{METHODS[method].title}: {steps} steps, {seconds:.0f} s a cell on average.")
    return lines


def cells_csv(table: Table, selection: Selection) -> str:
    """Every cell of the table, a line each."""
    lines = []
    for section in table.sections:
        for row, method, seed in product(section.rows, section.methods, _seeds(selection)):
            cell = section.cell(row, method, seed, selection.budget)
            result = selection.result(cell) or {}
            status = FINISHED if result else selection.status(cell)
            more = {"table": table.id, "status": status, "command": shown_command(result.get("command", []))}
            line = {**result, **vars(cell), "protocol": result.get("protocol", cell.protocol), **more}
            lines.append({name: line.get(name) for name in CSV_FIELDS})
    return csv_text(lines)


def _curves(section: Section, selection: Selection) -> dict[str, list[tuple[int, float, float]]]:
    """Method → (training images, mean AUROC, standard deviation), of the methods with at least two points."""
    curves = {}
    for method in section.methods:
        points = []
        for row in section.rows:
            if results := list(_results(section, row, method, selection).values()):
                numbers = [result["auroc"] for result in results]
                spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
                points.append((results[0]["num_train"], float(np.mean(numbers)), spread))
        if len(points) > 1:
            curves[method] = sorted(points)
    return curves


def plot(table: Table, selection: Selection, path: Path) -> list[Path]:
    """Draws AUROC against the number of training images, a panel a section that has a curve, with a band of one standard deviation. Baselines are
    dashed, and left out of a panel where they lie far from what was trained: the table has them.

    Returns:
        `path`; nothing if no section has a curve.

    Raises:
        InputError: matplotlib is missing.
    """
    drawn = [(section, curves) for section in table.sections if (curves := _curves(section, selection))]
    if not drawn:
        return []
    figure = new_figure("the picture needs", figsize=(max(7, 5.5 * len(drawn)), 4.2))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    legend = {}
    for panel, (section, curves) in zip(panels, drawn, strict=True):
        ticks = set()
        for method, points in curves.items():
            images, means, spreads = map(np.asarray, zip(*points, strict=True))
            color, of_pixels = f"C{section.methods.index(method)}", method in BASELINES
            line = panel.plot(images, means, "--" if of_pixels else "o-", markersize=4, color=color, linewidth=1 if of_pixels else 1.8)
            legend[METHODS[method].title] = line[0]
            if not of_pixels:
                panel.fill_between(images, means - spreads, means + spreads, color=color, alpha=0.12, linewidth=0)
            ticks |= set(images.tolist())
        trained = [points for method, points in curves.items() if method not in BASELINES]
        if trained:
            low = min(mean - spread for points in trained for _, mean, spread in points)
            high = max(mean + spread for points in trained for _, mean, spread in points)
            panel.set_ylim(low - 0.25 * (high - low) - 0.005, high + 0.25 * (high - low) + 0.005)
        panel.set_xscale("log")
        panel.set_xticks(sorted(ticks), labels=[str(tick) for tick in sorted(ticks)])
        panel.minorticks_off()
        panel.set_xlabel("training images")
        panel.set_title(RECIPES[section.dataset].title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("AUROC")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return [path]
