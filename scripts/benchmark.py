"""Measures what the design rests on, as ratios of two ways that take turns in one process (A B A B …), so that a busy machine slows both.

python scripts/benchmark.py --output speed.md
"""

import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from hf_anomaly import AnomalyDetectionPipeline, AnomalyDetector, DIAConfig, DIAModel, InputError, SharedAEConfig, SharedAEModel
from hf_anomaly.dissolving import DiffusionDissolver, build_scheduler, build_unet, network_resolution
from hf_anomaly.metrics import PixelMetrics
from hf_anomaly.ops.knn import max_cosine
from hf_anomaly.training import parse_arguments
from hf_anomaly.training.runs import run_script

SCORED_AT_ONCE = 64
VARIANTS = 8
TRANSFORMERS = (
    "from transformers import AutoModel, AutoImageProcessor, PreTrainedModel; from transformers.pipelines import PIPELINE_REGISTRY"
)


@dataclass
class BenchmarkArguments:
    """How much is measured."""

    image_size: int = field(default=28, metadata={"help": "Height and width of the images, in pixels."})
    batch_size: int = field(default=32, metadata={"help": "Images per training step."})
    bank_size: int = field(default=26_000, metadata={"help": "Images in the bank that is searched."})
    num_maps: int = field(default=200, metadata={"help": "Anomaly maps of 256×256 pixels that are measured."})
    repeats: int = field(default=5, metadata={"help": "Measurements of each way; the medians are reported."})
    output: str | None = field(default=None, metadata={"help": "Also write the table to this file."})

    def __post_init__(self):
        for name, least in (("image_size", 4), ("batch_size", 2), ("bank_size", 1), ("num_maps", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternately(a: Callable[[], float], b: Callable[[], float], repeats: int, warm_up: bool = True) -> tuple[float, float]:
    """Medians of what `a` and `b` measure, in turns, after a warm-up of each."""
    if warm_up:
        a(), b()
    pairs = [(a(), b()) for _ in range(repeats)]
    return tuple(statistics.median(side) for side in zip(*pairs, strict=True))


def training_step(model: DIAModel, args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """A step that dissolves on the fly, and one that takes cached variants."""
    shape = (model.config.num_channels, args.image_size, args.image_size)
    images, variants = torch.rand(args.batch_size, *shape) * 2 - 1, torch.rand(args.batch_size, VARIANTS, *shape) * 2 - 1
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()

    def step(**inputs):
        model(images, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    online, cached = alternately(lambda: seconds(step), lambda: seconds(lambda: step(dissolved_pixel_values=variants)), args.repeats)
    what = f"training step of {args.batch_size} images: dissolving online (A), cached (B)"
    return what, f"{1e3 * online:.0f} ms", f"{1e3 * cached:.0f} ms", online / cached


def scoring(model: DIAModel, args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """Whole scoring, and the bare encoder on as many views."""
    model.eval()
    images = torch.rand(SCORED_AT_ONCE, model.config.num_channels, args.image_size, args.image_size) * 2 - 1
    model.fit_reference([images], progress=False)
    views = len(model.reference.views) * len(model.reference.bank)

    @torch.no_grad()
    def encode():
        for _ in range(views):
            model.encode(images)

    score = torch.no_grad()(lambda: model(images))
    scored, encoded = alternately(lambda: seconds(score), lambda: seconds(encode), args.repeats)
    what = f"scoring at batch {SCORED_AT_ONCE}, {views} views an image: whole (A), the bare encoder (B)"
    return what, f"{SCORED_AT_ONCE / scored:.1f} images/s", f"{SCORED_AT_ONCE / encoded:.1f} images/s", encoded / scored


def pipeline(model: AnomalyDetector, args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """The pipeline, from PIL images to verdicts, and the bare forward pass on tensors."""
    size = args.image_size
    arrays = np.random.default_rng(0).integers(0, 256, (SCORED_AT_ONCE, size, size, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(array).convert("RGB" if model.config.num_channels == 3 else "L") for array in arrays]
    pipe = AnomalyDetectionPipeline(model, device="cpu")
    pixel_values = pipe.image_processor(images=images, return_tensors="pt")["pixel_values"]
    model.fit_reference([pixel_values], progress=False)
    model.calibrate([pixel_values], progress=False)

    @torch.no_grad()
    def forward():
        model(pixel_values)

    whole, bare = alternately(lambda: seconds(lambda: pipe(images, batch_size=SCORED_AT_ONCE)), lambda: seconds(forward), args.repeats)
    what = f"pipeline at batch {SCORED_AT_ONCE}, {type(model).__name__}: from images to verdicts (A), the bare forward pass (B)"
    return what, f"{SCORED_AT_ONCE / whole:.1f} images/s", f"{SCORED_AT_ONCE / bare:.1f} images/s", bare / whole


def bank_search(model: DIAModel, args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """The nearest of the bank for a batch at once, and for image after image."""
    shifts, width = len(model.reference.bank), model.score_width
    queries, bank = torch.randn(SCORED_AT_ONCE, shifts, width), torch.randn(shifts, args.bank_size, width)

    def loop():
        return torch.stack([F.cosine_similarity(query[:, None], bank, dim=-1).amax(1) for query in queries])

    torch.testing.assert_close(max_cosine(queries, bank), loop(), rtol=1e-4, atol=1e-5)
    at_once, one_by_one = alternately(lambda: seconds(lambda: max_cosine(queries, bank)), lambda: seconds(loop), args.repeats)
    what = f"{SCORED_AT_ONCE} images against a bank of {args.bank_size}×{width} a shift: one by one (A), at once (B)"
    return what, f"{1e3 * one_by_one:.0f} ms", f"{1e3 * at_once:.0f} ms", one_by_one / at_once


def pixel_metrics(args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """The exact AUROC of all pixels at once, and all pixel-level metrics batch by batch."""
    from sklearn.metrics import roc_auc_score

    rng, side = np.random.default_rng(0), 256
    masks = np.zeros((args.num_maps, side, side), bool)
    for mask in masks[::2]:
        row, column = rng.integers(0, side - 50, 2)
        mask[row : row + 50, column : column + 50] = True
    maps = (rng.standard_normal(masks.shape, np.float32) + masks) ** 2

    def binned() -> dict:
        metrics = PixelMetrics()
        for start in range(0, args.num_maps, 32):
            metrics.update(maps[start : start + 32], masks[start : start + 32])
        return metrics.compute()

    difference = abs(binned()["pixel_auroc"] - roc_auc_score(masks.ravel(), maps.ravel()))
    assert difference <= 1e-4, difference
    exact, ours = alternately(
        lambda: seconds(lambda: roc_auc_score(masks.ravel(), maps.ravel())), lambda: seconds(binned), args.repeats, warm_up=False
    )
    what = f"{maps.size / 1e6:.1f} M pixels: scikit-learn's exact AUROC (A), AUROC, average precision and AUPRO, binned (B; AUROC differs by {difference:.0e})"
    return what, f"{1e3 * exact:.0f} ms", f"{1e3 * ours:.0f} ms", exact / ours


def import_time(args: BenchmarkArguments) -> tuple[str, str, str, float]:
    """`import hf_anomaly`, and the parts of transformers that no detector can do without, in fresh processes."""

    def measure(statement: str) -> float:
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    ours, theirs = alternately(lambda: measure("import hf_anomaly"), lambda: measure(TRANSFORMERS), args.repeats, warm_up=False)
    return "import: hf_anomaly (A), what it needs of transformers (B)", f"{ours:.2f} s", f"{theirs:.2f} s", ours / theirs


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    torch.manual_seed(0)
    model = DIAModel(DIAConfig(image_size=args.image_size))
    unet = build_unet(network_resolution(args.image_size), model.config.num_channels).eval().requires_grad_(False)
    model.dissolver = DiffusionDissolver(unet, build_scheduler())

    small = SharedAEModel(SharedAEConfig(image_size=args.image_size))  # a forward pass of milliseconds, beside which all else counts
    rows = [training_step(model, args), scoring(model, args), pipeline(model, args), pipeline(small, args)]
    rows += [bank_search(model, args), pixel_metrics(args), import_time(args)]
    lines = ["| what | A | B | ratio A/B |", "|---|---|---|---|"]
    lines += [f"| {what} | {a} | {b} | {ratio:.2f} |" for what, a, b, ratio in rows]
    facts = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {datetime.date.today()}"
    table = "\n".join([*lines, "", f"{args.image_size}×{args.image_size} pixels, medians of {args.repeats} in turns; {facts}."])
    print(table)
    if args.output is not None:
        Path(args.output).write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
