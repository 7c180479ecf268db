"""From a detector and a dataset to a page: scores, tables, figures and examples, put into `page.html`."""

import base64
import io
import math
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..calibration import drift_check
from ..cards.figures import draw_precision_recall, draw_roc, draw_scores, new_figure
from ..data import decode_image, file_name, image_loader
from ..detector import AnomalyDetector
from ..errors import InputError
from ..files import write_output
from ..metrics import bootstrap_intervals, image_metrics
from ..training.evaluation import INTERVAL_CONFIDENCE, results_by_class
from ..training.localization import evaluate_maps
from ..version import __version__
from ..visualization import VISIBLE, overlay_anomaly_map, why_no_overlay

RATES = (0.01, 0.05, 0.1, 0.2)
LARGEST_PICTURE = 256  # px, of an example's longer side: the page stays small
CLASSES = ("normal", "anomalous")


def write_report(
    model: AnomalyDetector,
    processor,
    dataset,
    path: str | os.PathLike,
    *,
    has_labels: bool = True,
    title: str | None = None,
    data_name: str = "a dataset",
    split_hash: str | None = None,
    num_examples: int = 6,
    batch_size: int = 64,
) -> Path:
    """Writes one HTML page which needs no other file: metrics with bootstrap intervals, pixel-level ones where there are maps and masks, ROC and
    precision–recall curves, score histogram, thresholds for several false-positive rates and what they do on these images, and the images that the
    detector is surest and most wrong about, with their anomaly maps if it has them.

    Args:
        model: fitted; without calibration there are no thresholds.
        processor: the detector's.
        dataset: a `datasets.Dataset` with a column `image` and, with `has_labels`, `label` (0 normal, 1 anomalous); `row` if images have other numbers
            than their place in it; `class_name` for results by kind of anomaly; `mask` for pixel-level metrics, see `evaluate_maps`. If it has
            only normal or only anomalous images, what needs both is left out.
        path: of the page, replaced if it is there.
        has_labels: False: labels, if there are any, are ignored, and the page shows scores alone.
        title: default: the name of the place that the detector came from.
        data_name, split_hash: of the images, for the head of the page.
        num_examples: how many images each row of examples shows.
        batch_size: images scored at once.

    Returns:
        `path`.

    Raises:
        InputError: no images, matplotlib is missing, a number out of range, an unreadable image, or labels that are missing or neither 0 nor 1.
        NotFittedError: before `fit_reference`.
    """
    new_figure("the page's curves need")  # before anything is scored
    if len(dataset) == 0:
        raise InputError(f"{data_name} holds no images: there is nothing to report on")
    if num_examples < 1:
        raise InputError(f"num_examples must be at least 1, got {num_examples}")
    if not has_labels:
        dataset = dataset.remove_columns([name for name in ("label", "labels") if name in dataset.column_names])
    elif "label" not in dataset.column_names:
        raise InputError(f"{data_name} has no column 'label', only {', '.join(dataset.column_names)}: name it so, or give has_labels=False")
    scores, labels = model.score(image_loader(dataset, processor, batch_size))
    labels = None if labels is None else labels.numpy()
    calibration = model.calibration if model.calibration.is_calibrated else None
    threshold = None if calibration is None else calibration.threshold.item()
    numbers = scores.double().numpy()
    measured = None if labels is None else image_metrics(numbers, labels, threshold)  # which refuses labels that are neither 0 nor 1
    both = labels is not None and 0 < labels.sum() < len(labels)
    has_masks = labels is not None and "mask" in dataset.column_names
    pixel_metrics = evaluate_maps(model, processor, dataset, batch_size) if has_masks and model.supports_anomaly_maps else {}
    drift = None
    if labels is not None and calibration is not None and (labels == 0).any():
        drift = drift_check(scores[labels == 0], calibration.scores)
    drawn = {"scores": draw_scores} | ({"roc": draw_roc, "precision_recall": draw_precision_recall} if both else {})
    title = title or Path(str(model.config.name_or_path)).name or type(model).__name__
    page = _template().render(
        title=title,
        facts=_facts(model, dataset, labels, data_name, split_hash),
        metrics=measured if both else None,
        intervals=bootstrap_intervals(numbers, labels, confidence=INTERVAL_CONFIDENCE) if both else {},
        confidence=INTERVAL_CONFIDENCE,
        by_class=results_by_class(model, dataset, scores, torch.from_numpy(labels)) if both else {},
        pixel_metrics=pixel_metrics,
        counts=None if labels is None else {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)},
        drift=drift,
        thresholds=[] if calibration is None else _thresholds(model, scores, labels),
        num_calibration=0 if calibration is None else calibration.scores.numel(),
        figures={name: _render(draw, numbers, labels, threshold) for name, draw in drawn.items()},
        examples=_examples(model, processor, dataset, scores, labels, num_examples),
        maps=not why_no_overlay(model),
        infinity=math.inf,
        version=__version__,
    )
    write_output(path, page)
    return Path(path)


def _template():
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["score"] = lambda value: f"{value:.6g}" if math.isfinite(value) else "∞"  # of any scale
    environment.filters["interval"] = lambda ends: " to ".join(map(_number, ends))
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _number(value: float | None, digits: int = 3) -> str:
    """For a cell of a table."""
    return "–" if value is None else f"{value:.{digits}f}"


def _facts(model, dataset, labels, data_name: str, split_hash: str | None) -> dict[str, str]:
    config = model.config
    facts = {
        "Method": f"{type(model).__name__}, {config.images_in_words}",
        "Trained on": f"normal: {config.normal_label}" if config.normal_label else "unknown",
        "Calibrated on": f"{config.num_calibration_scores} held-out normal images, for a false-positive rate of {config.false_positive_rate:g}"
        if model.calibration.is_calibrated
        else "nothing: it has no threshold",
        "Data": data_name,
        "Images": f"{len(dataset)}, unlabelled" if labels is None else f"{(labels == 0).sum()} normal, {(labels == 1).sum()} anomalous",
    }
    return facts | ({"Split hash": split_hash} if split_hash else {})


def _thresholds(model, scores: torch.Tensor, labels: np.ndarray | None) -> list[dict]:
    """For each target rate the threshold, and what it does on these images; None where there is no such image."""
    own = model.config.false_positive_rate
    rows = []
    for rate in sorted({own, *RATES}):
        threshold = model.calibration.threshold_at(None if rate == own else rate)
        flagged = (scores > threshold).numpy()
        row = {"rate": rate, "is_own": rate == own, "threshold": threshold, "flagged": int(flagged.sum())}
        if labels is not None:
            row["fpr"] = _share(flagged[labels == 0])
            row["tpr"] = _share(flagged[labels == 1])
            row["precision"] = _share(labels[flagged] == 1) if (labels == 1).any() else None
        rows.append(row)
    return rows


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# Pictures -------------------------------------------------------------------------------------------------------------------------


def _render(draw, *values) -> str:
    """A drawing of `cards.figures` as a data URI."""
    figure = new_figure("the page's curves need")
    draw(figure, *values)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _picture(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    (image if image.mode == "L" else image.convert("RGB")).save(file, format="PNG")  # as the detector sees it; PNG knows few other modes
    return _data_uri(file.getvalue())


def _examples(model, processor, dataset, scores: torch.Tensor, labels: np.ndarray | None, count: int) -> list[dict]:
    """Rows of images, the most telling first, each with a heading, a sentence on it, and what the detector says of the images."""
    order = scores.argsort().tolist()
    if labels is None:
        rows = [("Highest scores", "The detector finds these least like normal images.", order[::-1])]
        rows += [("Lowest scores", "These it finds the most normal.", order)]
    else:
        normal, anomalous = ([row for row in order if labels[row] == label] for label in (0, 1))
        rows = [
            ("Normal images with the highest scores", "The worst false alarms.", normal[::-1]),
            ("Anomalous images with the lowest scores", "The anomalies that are the easiest to miss.", anomalous),
            ("Anomalous images with the highest scores", "The anomalies that it is surest of.", anomalous[::-1]),
            ("Normal images with the lowest scores", "The images that it finds the most normal.", normal),
        ]
    return [
        {"heading": heading, "text": text, "images": _shown(model, processor, dataset, chosen[:count], scores, labels)}
        for heading, text, chosen in rows
        if chosen
    ]


@torch.no_grad()
def _shown(model, processor, dataset, rows: list[int], scores: torch.Tensor, labels: np.ndarray | None) -> list[dict]:
    records = [dataset[row] for row in rows]
    numbers = [record.get("row", row) for row, record in zip(rows, records, strict=True)]
    images = [decode_image(record["image"], f"row {n}", processor.window) for n, record in zip(numbers, records, strict=True)]
    maps = None
    if not why_no_overlay(model):
        pixel_values = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        maps = model.eval()(pixel_values, output_anomaly_maps=True).anomaly_maps
    p_values = model.p_values(scores[rows]).tolist() if model.calibration.is_calibrated else [None] * len(rows)
    shown = []
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
        shown.append(
            {
                "name": file_name(records[i]["image"], f"row {numbers[i]}"),
                "label": None if labels is None else CLASSES[labels[row]],
                "score": f"{scores[row]:.4g}",
                "p_value": None if p_values[i] is None else f"{p_values[i]:.3g}",
                "is_flagged": p_values[i] is not None and bool(model.is_anomalous(scores[row : row + 1])),
                "image": _picture(image),
                "overlay": None
                if maps is None
                else _picture(overlay_anomaly_map(image, maps[i], value_range=model.config.anomaly_map_range, least_size=VISIBLE)),
            }
        )
    return shown
