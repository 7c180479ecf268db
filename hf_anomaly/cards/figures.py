"""The card's figures, small PNG files in `figures/`: how the scores of normal and anomalous images lie, the ROC curve, and example images."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image

from ..errors import InputError
from ..files import delete, staged

logger = logging.getLogger(__name__)

FOLDER = "figures"
FIGURES = {  # file → what it shows, in the card's order
    "scores.png": "How many normal and anomalous images of the evaluation split have which score",
    "roc.png": "ROC curve on the evaluation split",
    "examples.png": "Images of the evaluation split with the lowest, the median and the highest score, normal ones first; below them the anomaly maps, if any",
}


def new_figure(what: str, **settings):
    """An empty figure of matplotlib.

    Raises:
        InputError: matplotlib is missing; `what` needs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{what} matplotlib: pip install 'hf-anomaly[plots]'") from error
    figure = Figure(layout="constrained", **settings)
    FigureCanvasAgg(figure)
    return figure


def remove_figures(folder: str | os.PathLike) -> None:
    """Removes an earlier evaluation's figures from `folder/figures`. What else lies there stays."""
    folder = Path(folder, FOLDER)
    if folder.is_dir():
        for name in FIGURES:
            delete(folder / name)
        if not any(folder.iterdir()):
            delete(folder)


def keep_other_files(folder: str | os.PathLike, staging: str | os.PathLike) -> None:
    """Copies what lies in `folder/figures` beside an evaluation's figures to `staging/figures`, which is about to take its place."""
    folder, staging = Path(folder, FOLDER), Path(staging, FOLDER)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in FIGURES:
            staging.mkdir(exist_ok=True)
            delete(staging / path.name)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, staging / path.name, symlinks=True)
            else:
                shutil.copy2(path, staging / path.name, follow_symlinks=False)


def write_figures(
    folder: str | os.PathLike,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float | None = None,
    examples: list[tuple[PIL.Image.Image, PIL.Image.Image | None, str]] = (),
) -> None:
    """Draws the figures of an evaluation in `folder/figures`, in place of an earlier one's. Without matplotlib there are none, and a warning says so.

    Args:
        scores: (N,), higher = more anomalous.
        labels: (N,), 0 normal, 1 anomalous; both occur.
        threshold: is marked, if it is finite.
        examples: image, the same with its anomaly map (or None), and caption.
    """
    remove_figures(folder)
    folder = Path(folder, FOLDER)
    try:
        new_figure("the card's figures need")
    except InputError as error:
        logger.warning("%s", error)
        return
    drawn = {"scores.png": draw_scores, "roc.png": draw_roc} | ({"examples.png": _examples} if examples else {})
    with staged(folder) as staging:
        for name, draw in drawn.items():
            figure = new_figure("the card's figures need")
            draw(figure, *((examples,) if draw is _examples else (np.asarray(scores), np.asarray(labels), threshold)))
            figure.savefig(staging / name, dpi=80, metadata={"Software": None})


def draw_scores(figure, scores, labels, threshold) -> None:
    """Histogram of the scores (N,), by label (N,), or of all where labels is None; on an empty figure of matplotlib, as the others here."""
    figure.set_size_inches(6, 3)
    axes = figure.add_subplot()
    scores = np.asarray(scores, np.float64)  # between scores that nearly tie float32 has no room for the bins
    marked = threshold is not None and np.isfinite(threshold)
    low, high = np.quantile(scores, (0.25, 0.75))
    reach = 3 * (high - low)  # beyond it are stragglers, which would squeeze all others into one bar
    if marked:  # they stay on their side of it
        low, high = min(low, threshold), max(high, threshold)
    shown = np.clip(scores, low - reach, high + reach) if reach > 0 else scores
    bins = np.histogram_bin_edges(shown, 40)
    if labels is None:
        axes.hist(shown, bins, color="#475467", label=f"all ({len(scores)})")
    for label, name, color in ((0, "normal", "#475467"), (1, "anomalous", "#b42318")):
        if labels is not None and (labels == label).any():
            axes.hist(shown[labels == label], bins, alpha=0.6, color=color, label=f"{name} ({(labels == label).sum()})")
    if marked:
        axes.axvline(threshold, color="black", linestyle="--", label="threshold")
    axes.set(xlabel="score" + (" (stragglers in the outermost bars)" if (shown != scores).any() else ""), ylabel="images")
    axes.legend()


def draw_roc(figure, scores, labels, threshold) -> None:
    """ROC curve, with the point of the threshold."""
    from sklearn.metrics import roc_auc_score, roc_curve

    figure.set_size_inches(3.6, 3.6)
    axes = figure.add_subplot()
    axes.plot(*roc_curve(labels, scores)[:2], color="#b42318", label=f"AUROC {roc_auc_score(labels, scores):.3f}")
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.8, linestyle=":")
    if threshold is not None and np.isfinite(threshold):
        flagged = scores > threshold
        axes.plot(flagged[labels == 0].mean(), flagged[labels == 1].mean(), "o", color="black", label="threshold")
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", aspect="equal")
    axes.legend(loc="lower right")


def draw_precision_recall(figure, scores, labels, threshold) -> None:
    """Precision against recall, with the point of the threshold and the precision of flagging everything."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure.set_size_inches(3.6, 3.6)
    axes = figure.add_subplot()
    precision, recall, _ = precision_recall_curve(labels, scores)
    axes.plot(
        recall, precision, color="#b42318", drawstyle="steps-post", label=f"average precision {average_precision_score(labels, scores):.3f}"
    )
    axes.axhline(labels.mean(), color="gray", linewidth=0.8, linestyle=":", label=f"share of anomalies {labels.mean():.3f}")
    flagged = scores > threshold if threshold is not None else np.zeros(len(scores), dtype=bool)
    if flagged.any():
        axes.plot(flagged[labels == 1].mean(), labels[flagged].mean(), "o", color="black", label="threshold")
    axes.set(xlabel="recall (true-positive rate)", ylabel="precision", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
    axes.legend(loc="lower right")


def _examples(figure, examples) -> None:
    rows = 2 if any(overlay is not None for _, overlay, _ in examples) else 1
    figure.set_size_inches(1.5 * len(examples), 1.6 * rows + 0.2)
    grid = figure.subplots(rows, len(examples), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (image, overlay, caption) in enumerate(examples):
        for row, shown in enumerate((image, overlay)[:rows]):
            if shown is not None:
                grid[row, column].imshow(shown.convert("RGB"))
        grid[0, column].set_title(caption.replace("$", r"\$"), fontsize=8)
