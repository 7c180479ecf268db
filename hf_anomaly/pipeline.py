"""`pipeline("image-anomaly-detection", model=…)`: images of any kind in, score, p-value and verdict out."""

import difflib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline

from .calibration import check_rate, least_rate
from .data.transforms import num_pages, process_decoded
from .detector import AnomalyDetector, AnomalyDetectorOutput
from .errors import HubError, InputError, one_line
from .hub import CommitInfo
from .image_processing import AnomalyImageProcessor

logger = logging.getLogger(__name__)

TASK = "image-anomaly-detection"
OPTIONS = ("threshold", "false_positive_rate", "output_anomaly_maps", "timeout", "batch_size", "num_workers")


class AnomalyDetectionPipeline(Pipeline):
    """Scores images with a detector.

        pipe = pipeline("image-anomaly-detection", model="org/name")
        pipe("chest.png")  # {"score": 1.73, "p_value": 0.02, "label": "anomaly", "threshold": 1.64}

    Args:
        model: a detector.
        image_processor: the one that was saved with it; by default one for images of its size and channels.
        threshold, false_positive_rate, output_anomaly_maps, timeout: defaults for the calls, see there.

    Raises:
        InputError: the model is no detector, or the processor none of this package, or it makes other images than the model takes.
    """

    _load_image_processor = True
    _load_video_processor = False
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, model, image_processor=None, **kwargs):
        if not isinstance(getattr(model, "_orig_mod", model), AnomalyDetector):  # as torch.compile wraps it
            raise InputError(f"pipeline({TASK!r}) needs an anomaly detector, but the model is a {type(model).__name__}")
        image_processor = image_processor or AnomalyImageProcessor.for_images(model.config.image_size, model.config.num_channels)
        if not isinstance(image_processor, AnomalyImageProcessor):
            raise InputError(f"pipeline({TASK!r}) needs an AnomalyImageProcessor, not a {type(image_processor).__name__}")
        image_processor.check_fits(model.config)
        self._warned = False
        super().__init__(model=model.eval(), image_processor=image_processor, **kwargs)

    def _sanitize_parameters(self, threshold=None, false_positive_rate=None, output_anomaly_maps=None, timeout=None, **unknown):
        for name in unknown:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            raise InputError(f"unknown argument {name!r}: " + (f"did you mean {close[0]}?" if close else f"give {', '.join(OPTIONS)}"))
        if threshold is not None and false_positive_rate is not None:
            raise InputError("threshold and false_positive_rate both say what is flagged: give one of them")
        for name, number in (("threshold", threshold), ("false_positive_rate", false_positive_rate)):
            if number is not None and not hasattr(number, "__float__"):
                raise InputError(f"{name} must be a number, got {number!r}")
        threshold, false_positive_rate = (None if number is None else float(number) for number in (threshold, false_positive_rate))
        if threshold is not None and math.isnan(threshold):
            raise InputError("threshold is NaN: give a score")
        if false_positive_rate is not None:
            check_rate(false_positive_rate)
        decided = threshold is not None or false_positive_rate is not None
        return (
            {} if timeout is None else {"timeout": timeout},
            {} if output_anomaly_maps is None else {"output_anomaly_maps": output_anomaly_maps},
            {"threshold": threshold, "false_positive_rate": false_positive_rate} if decided else {},
        )

    def __call__(self, inputs, *, batch_size: int | None = None, num_workers: int | None = None, **parameters):
        """Scores one image or several.

        Args:
            inputs: an image, as the path or http(s) URL of a file, a PIL image, an array (H, W), (H, W, C) or, unless the detector's images are gray and it
                is in colour, (C, H, W) of uint8 or of floats in [0, 1], or `{"bytes", "path"}` as a dataset holds it undecoded; several, as a list, a
                4-dimensional array or a column `dataset["image"]`; or a torch dataset (transformers' `KeyDataset`), a generator or a streamed column,
                whose results come one by one while the memory stays constant.
            batch_size: images scored at once; 1 by default.
            num_workers: processes that read and prepare the images; 0, none, by default.
            threshold: flag the scores strictly above this one.
            false_positive_rate: … or above the threshold at this rate, instead of the rate of `calibrate`.
            output_anomaly_maps: also give `anomaly_map`.
            timeout: seconds to wait for a URL; 30 by default.

        Returns:
            For one image a dict, for a list or a column a list of them, else an iterator over them: `score` (float, higher = more anomalous), `p_value`
            (float, the share of normal images that score at least so high), `label` ("normal" or "anomaly"), `threshold` (float), and on request
            `anomaly_map`, (H, W) float32 at the size of the image. Of a detector that is not calibrated p-value and, unless one is given, threshold
            and label are None.

        Raises:
            InputError: an image that cannot be read, named by its file, URL or row; maps asked of a method that has none; or an unknown keyword.
            NotFittedError: the detector is not fitted.
        """
        self.model.require_fitted()
        given = self._sanitize_parameters(**parameters)
        before = (self._preprocess_params, self._forward_params, self._postprocess_params)
        preprocess, forward, decision = (old | new for old, new in zip(before, given, strict=True))
        batch_size = next(size for size in (batch_size, self._batch_size, 1) if size is not None)
        num_workers = next(count for count in (num_workers, self._num_workers, 0) if count is not None)
        if not hasattr(batch_size, "__index__") or batch_size < 1:
            raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        batch_size = int(batch_size)  # of NumPy, DataLoader takes none
        images, several = _images(inputs, self.image_processor)
        results = self.get_iterator(images, num_workers, batch_size, preprocess, forward, {"threshold": self._threshold(**decision)})
        if several is None:
            return next(results)
        return list(results) if several else results

    def _threshold(self, threshold: float | None = None, false_positive_rate: float | None = None) -> float | None:
        if threshold is not None:
            return threshold
        if (calibration := self.model.calibration).is_calibrated:
            value = calibration.threshold_at(false_positive_rate)
            if false_positive_rate is None and math.isinf(value):  # of a rate that is asked for, `threshold_at` tells
                n, rate = calibration.scores.numel(), self.model.config.false_positive_rate
                logger.warning(
                    "The detector's threshold is infinite, so that nothing is flagged: %d calibration images are too few for its rate of %g. Give a "
                    "threshold or a false_positive_rate of at least %g, or calibrate it with more images.",
                    n,
                    rate,
                    least_rate(n),
                )
            return value
        if not self._warned:
            logger.warning(
                "The detector is not calibrated: its scores rank images, but p_value, threshold and label are None. Call "
                "calibrate(dataloader) with held-out normal images and save it again, or give a threshold."
            )
        self._warned = True
        return None

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params) -> Iterator[dict]:
        # transformers' own prepares and unpacks image by image, which takes longer than a small detector's forward pass.
        loader = DataLoader(
            inputs,
            batch_size=batch_size,
            num_workers=num_workers if isinstance(inputs, Sized) else 0,
            collate_fn=partial(_or_error, partial(_prepare, processor=self.image_processor, **preprocess_params)),
        )
        for model_inputs in loader:
            if isinstance(model_inputs, InputError):
                raise model_inputs
            yield from self.postprocess(self.forward(model_inputs, **forward_params), **postprocess_params)

    def preprocess(self, images: list[tuple[str, Any]], timeout: float = 30.0) -> dict:
        """B pairs (name for errors, image) → `pixel_values` (B, C, H, W) and `target_sizes` (B, 2), heights and widths."""
        return _prepare(images, self.image_processor, timeout)

    def _forward(self, model_inputs: dict, output_anomaly_maps: bool = False) -> dict:
        if self.model.training:  # as it is after a training
            self.model.eval()
        output = self.model(model_inputs["pixel_values"], output_anomaly_maps=output_anomaly_maps)
        return {"scores": output.scores, "anomaly_maps": output.anomaly_maps, "target_sizes": model_inputs["target_sizes"]}

    def postprocess(self, model_outputs: dict, threshold: float | None) -> list[dict]:
        scores, maps = model_outputs["scores"], model_outputs["anomaly_maps"]
        results = self.image_processor.post_process_anomaly_detection(
            AnomalyDetectorOutput(scores=scores, anomaly_maps=maps), None if maps is None else model_outputs["target_sizes"]
        )
        p_values = self.model.p_values(scores).tolist() if self.model.calibration.is_calibrated else [None] * len(results)
        return [
            {
                "score": result["score"],
                "p_value": p_value,
                "label": None if threshold is None else "anomaly" if result["score"] > threshold else "normal",
                "threshold": threshold,
            }
            | ({} if maps is None else {"anomaly_map": result["anomaly_map"]})
            for result, p_value in zip(results, p_values, strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves detector and processor. The pipeline itself is the package's: no code is copied, no `custom_pipelines` written."""
        if kwargs.get("push_to_hub"):
            kwargs["image_processor"] = self.image_processor
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **settings) -> CommitInfo:
        """Pushes detector and processor whole, in one commit; `settings` and errors are those of `AnomalyDetector.push_to_hub`."""
        return self.model.push_to_hub(repo_id, image_processor=self.image_processor, **settings)


class _Rows(Dataset):
    """(name for errors, image) of every row; an `InputError` in place of an image that could not be read."""

    def __init__(self, images: Sequence, kind: str):
        self.images, self.kind = images, kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[str, Any]:
        return _read(self.kind.format(row), lambda: self.images[row])


class _Stored(Sequence):
    """A column of images, undecoded but for files from elsewhere, which datasets fetches."""

    def __init__(self, column: Sequence, undecoded: Sequence):
        self.column, self.undecoded = column, undecoded

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> Any:
        value = self.undecoded[row]
        is_elsewhere = value is not None and value["bytes"] is None and "://" in (value["path"] or "")
        return self.column[row] if is_elsewhere else value


def _as_stored(column: Sequence) -> Sequence:
    """A dataset's column as `_Stored`: decoded by datasets, images of more than 8 bits no longer tell how they are meant, TIFFs that EXIF turns are scrambled,
    and a batch of large ones takes gigabytes. Any other sequence as it is, and what a format, a transform or a mode asked for has changed."""
    import datasets

    rows = getattr(column, "source", None)
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] is not None or column.features != datasets.Image():
        return column
    return _Stored(column, rows.cast_column(column.column_name, datasets.Image(decode=False))[column.column_name])


class _Stream(IterableDataset):
    """As `_Rows`, of images that come one by one. A batch of them is read before it is prepared: what may be another image by then is kept apart."""

    def __init__(self, images: Iterable, processor: AnomalyImageProcessor):
        self.images, self.processor = images, processor

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        images, end = iter(self.images), object()
        for i in count():
            name, image = _read(f"image {i}", lambda: next(images, end))
            if image is end:
                return
            yield _read(name, partial(self._kept, image, name))

    def _kept(self, image, name: str):
        if isinstance(image, (np.ndarray, torch.Tensor)):  # a buffer into which the next frame goes
            return image.clone() if isinstance(image, torch.Tensor) else image.copy()
        if isinstance(image, PIL.Image.Image) and num_pages(image) > 1:  # of which the next page is shown
            return self.processor.read(image, name).copy()
        return image


def _read(name: str, read: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return name, read()
    except InputError as error:
        return name, error
    except HubError:
        raise
    except Exception as error:  # datasets decodes an image as it reads the row, and on broken files PIL raises errors of every kind
        reason = "unknown image format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        return name, InputError(f"{name}: cannot be read ({reason}); remove it or replace it by an intact image")


def _images(inputs, processor: AnomalyImageProcessor) -> tuple[Dataset, bool | None]:
    """The images as a dataset, and how their results are given: True, as a list; False, one by one; None, that of a single image."""
    if hasattr(inputs, "column_names"):
        raise InputError("a whole dataset was given: give its column of images, such as dataset['image']")
    if isinstance(inputs, (str, os.PathLike, PIL.Image.Image, dict)):
        return _Rows([inputs], "the image"), None
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        return (_Rows(inputs, "images[{}]"), True) if inputs.ndim == 4 else (_Rows([inputs], "the image"), None)
    if isinstance(inputs, (list, tuple)):
        return _Rows(inputs, "images[{}]"), True
    if isinstance(inputs, Sequence):
        return _Rows(_as_stored(inputs), "row {}"), True
    if isinstance(inputs, Dataset) and isinstance(inputs, Sized):
        return _Rows(inputs, "row {}"), False
    if isinstance(inputs, Iterable):
        return _Stream(inputs, processor), False
    raise InputError(f"a {type(inputs).__name__} is no image: give a path, a URL, a PIL image, an array, or several of them")


def _prepare(images: list[tuple[str, Any]], processor: AnomalyImageProcessor, timeout: float = 30.0) -> dict:
    """`AnomalyDetectionPipeline.preprocess`, as a function: with the method a worker process that is not forked would be sent the whole detector."""
    for _, image in images:
        if isinstance(image, InputError):  # its row could not be read
            raise image
    sizes = []

    def decoded() -> Iterator[PIL.Image.Image]:
        for name, image in images:
            image = processor.read(image, name, timeout)
            sizes.append(image.size[::-1])
            yield image

    pixel_values = torch.stack(process_decoded(decoded(), processor, "pt"))
    return {"pixel_values": pixel_values, "target_sizes": np.array(sizes)}


def _or_error(action, batch):
    """What the action gives, or its `InputError` as a value: a worker process would bury the message in its traceback."""
    try:
        return action(batch)
    except InputError as error:
        return error
