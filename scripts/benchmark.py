"""Measures what the design rests on, as ratios of two ways that take turns (A B A B …), in one process where they can, so that a busy machine slows both.

python scripts/benchmark.py --output speed.md
python scripts/benchmark.py --rows trainer bfloat16 --repeats 3
"""

import copy
import datetime
import io
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.hf_argparser import HfArg

from hf_anomaly import (
    AnomalyDetectionPipeline,
    AnomalyDetector,
    AnomalyImageProcessor,
    CSIConfig,
    CSIModel,
    DIAConfig,
    DIAModel,
    InputError,
    SharedAEConfig,
    SharedAEModel,
    prepare,
)
from hf_anomaly.cli.running import run_script
from hf_anomaly.data import collate, image_loader, stream_one_class
from hf_anomaly.dissolving import DiffusionDissolver, build_scheduler, build_unet, default_resolution, network_resolution
from hf_anomaly.files import check_output, writing
from hf_anomaly.metrics import PixelMetrics
from hf_anomaly.ops.contrastive import amplified_nt_xent
from hf_anomaly.ops.knn import max_cosine
from hf_anomaly.training import AnomalyTrainer, AnomalyTrainingArguments, parse_arguments

SCORED_AT_ONCE = 64
BANK_WIDTH = 128
SHORT_STREAM = 200
VARIANTS = 8
TRAINED_STEPS = 40
TRANSFORMERS = (
    "from transformers import AutoModel, AutoImageProcessor, PreTrainedModel; from transformers.pipelines import PIPELINE_REGISTRY"
)


@dataclass
class BenchmarkArguments:
    """How much is measured."""

    image_size: int = HfArg(default=28, help="Height and width of the images, in pixels.")
    batch_size: int = HfArg(default=32, help="Images per training step.")
    bank_size: int = HfArg(default=26_000, help="Images in the bank that is searched.")
    num_images: int = HfArg(default=20_000, help="Images of the longer stream whose scoring takes how much memory.")
    num_maps: int = HfArg(default=200, help="Anomaly maps of 256×256 pixels that are measured.")
    repeats: int = HfArg(default=5, help="Measurements of each way; the medians are reported.")
    rows: list[str] | None = HfArg(default=None, help="What is measured; default: all. A wrong name lists them.")
    output: str | None = HfArg(default=None, help="Also write the table to this file.")

    def __post_init__(self):
        if unknown := [name for name in self.rows or () if name not in ROWS]:
            raise InputError(f"--rows {unknown[0]} is unknown; there are {', '.join(ROWS)}")
        for name, least in (("image_size", 4), ("batch_size", 2), ("bank_size", 1), ("num_images", 1), ("num_maps", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def printed_by(code: str) -> float:
    """The number that a fresh Python process prints."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def step_of(model: AnomalyDetector, forward: Callable[[], object]) -> Callable[[], float]:
    """Times a training step of the model, of which `forward` gives the output with the loss."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        forward().loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(step)


def alternately(a: Callable[[], float], b: Callable[[], float], repeats: int, warm_up: bool = True) -> tuple[float, float]:
    """Medians of what `a` and `b` measure, in turns, after a warm-up of each."""
    if warm_up:
        a(), b()
    pairs = [(a(), b()) for _ in range(repeats)]
    return tuple(statistics.median(side) for side in zip(*pairs, strict=True))


def table_row(what: str, unit: str, a: float, b: float, digits: int = 0) -> str:
    return f"| {what} | {a:.{digits}f} {unit} | {b:.{digits}f} {unit} | {a / b:.2f} |"


def small_dia(args: BenchmarkArguments) -> DIAModel:
    """DIA as its script builds it, with an untrained diffusion model to dissolve with."""
    model = DIAModel(DIAConfig(image_size=args.image_size))
    resolution = network_resolution(args.image_size, default_resolution(args.image_size))
    model.dissolver = DiffusionDissolver(build_unet(resolution, model.config.num_channels), build_scheduler())
    return model


def random_images(model: AnomalyDetector, count: int) -> torch.Tensor:
    return torch.rand(count, model.config.num_channels, model.config.image_size, model.config.image_size) * 2 - 1


def training_step(args: BenchmarkArguments) -> str:
    """A step that dissolves on the fly, and one that takes cached variants."""
    model = small_dia(args).train()
    images, variants = random_images(model, args.batch_size), random_images(model, args.batch_size * VARIANTS)
    variants = variants.unflatten(0, (args.batch_size, VARIANTS))
    ways = (lambda: model(images), lambda: model(images, dissolved_pixel_values=variants))
    online, cached = alternately(*(step_of(model, way) for way in ways), args.repeats)
    what = f"training step of {args.batch_size} images: dissolving online (A), cached (B)"
    return table_row(what, "ms", 1e3 * online, 1e3 * cached)


def scoring(args: BenchmarkArguments) -> str:
    """Whole scoring, and the bare encoder on as many views."""
    model = small_dia(args).eval()
    images = random_images(model, SCORED_AT_ONCE)
    model.fit_reference([images], progress=False)
    views = len(model.reference.views) * len(model.reference.bank)

    @torch.no_grad()
    def encode():
        for _ in range(views):
            model.encode(images)

    score = torch.no_grad()(lambda: model(images))
    scored, encoded = alternately(lambda: seconds(score), lambda: seconds(encode), args.repeats)
    what = f"scoring at batch {SCORED_AT_ONCE}, {views} views an image: whole (A), the bare encoder (B)"
    return table_row(what, "images/s", SCORED_AT_ONCE / scored, SCORED_AT_ONCE / encoded, digits=1)


def pipeline(model: AnomalyDetector, args: BenchmarkArguments) -> str:
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
    return table_row(what, "images/s", SCORED_AT_ONCE / whole, SCORED_AT_ONCE / bare, digits=1)


def bank_search(args: BenchmarkArguments) -> str:
    """The nearest of the bank for a batch at once, and for image after image and shift after shift, as CSI's authors score."""
    shifts = len(small_dia(args).reference.bank)
    queries, bank = torch.randn(SCORED_AT_ONCE, shifts, BANK_WIDTH), torch.randn(shifts, args.bank_size, BANK_WIDTH)
    directions = F.normalize(bank, dim=-1)  # once, before the scoring

    def nearest(query: torch.Tensor) -> torch.Tensor:
        pairs = zip(F.normalize(query, dim=-1), directions, strict=True)
        return torch.stack([(feature * rows).sum(dim=1).max() for feature, rows in pairs])

    def loop():
        return torch.stack([nearest(query) for query in queries])

    torch.testing.assert_close(max_cosine(queries, bank), loop(), rtol=0, atol=1e-5)
    at_once, one_by_one = alternately(lambda: seconds(lambda: max_cosine(queries, bank)), lambda: seconds(loop), args.repeats)
    what = f"{SCORED_AT_ONCE} images against a bank of {args.bank_size}×{BANK_WIDTH} a shift: one by one (A), at once (B)"
    return table_row(what, "ms", 1e3 * one_by_one, 1e3 * at_once)


def memory(args: BenchmarkArguments) -> str:
    """What a fresh process holds at most while it scores a short stream of images, and a long one."""
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars

    disable_progress_bars()
    pixels = np.linspace(0, 255, 128 * 128).reshape(128, 128).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(png := io.BytesIO(), "png")
    image = {"bytes": png.getvalue(), "path": None}
    features = Features({"image": Image(), "label": ClassLabel(names=["normal", "anomaly"])})

    def measure(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "test.parquet"))
            Dataset.from_dict({"image": [image] * count, "label": [0] * count}, features).to_parquet(path, batch_size=100)
            code = f"import runpy; print(runpy.run_path({__file__!r})['held_while_scoring']({path!r}, {args.image_size}))"
            return printed_by(code) / 2**20

    short, long = measure(SHORT_STREAM), measure(args.num_images)
    what = f"SharedAE scores a stream of {SHORT_STREAM} images (A), of {args.num_images:,} (B): the most memory that the process holds"
    return table_row(what, "MiB", short, long)


def held_while_scoring(path: str, image_size: int) -> int:
    """Scores a parquet file's images and gives the most bytes that the process held when a batch came."""
    import psutil

    test = stream_one_class(path, evaluation_only=True, head=2).test
    model = SharedAEModel(SharedAEConfig(image_size=image_size))
    model.fit_reference([random_images(model, 2)], progress=False)
    processor = AnomalyImageProcessor.for_images(image_size, model.config.num_channels)
    held = []

    def watched():
        for batch in image_loader(test, processor, SCORED_AT_ONCE):
            held.append(psutil.Process().memory_info().rss)
            yield batch

    model.score(watched(), progress=False)
    return max(held)


def pixel_metrics(args: BenchmarkArguments) -> str:
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
    return table_row(what, "ms", 1e3 * exact, 1e3 * ours)


def import_time(args: BenchmarkArguments) -> str:
    """`import hf_anomaly`, and the parts of transformers that no detector can do without, in fresh processes."""

    def measure(statement: str) -> float:
        return printed_by(f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)")

    ours, theirs = alternately(lambda: measure("import hf_anomaly"), lambda: measure(TRANSFORMERS), args.repeats, warm_up=False)
    return table_row("import: hf_anomaly (A), what it needs of transformers (B)", "s", ours, theirs, digits=2)


def step_in_two_ways(args: BenchmarkArguments, what: str, change: Callable[[CSIModel], Callable], name: str) -> str:
    """A training step of CSI as it is, and changed.

    Args:
        change: takes a model of its own and gives what is called with images instead of it.
        name: of the changed way.
    """
    plain = CSIModel(CSIConfig(image_size=args.image_size)).train()
    changed = copy.deepcopy(plain)
    images = random_images(plain, args.batch_size)
    a, b = alternately(step_of(plain, partial(plain, images)), step_of(changed, partial(change(changed), images)), args.repeats)
    what = f"training step of {args.batch_size} images, CSI: {what} (A), {name} (B)"
    return table_row(what, "ms", 1e3 * a, 1e3 * b)


def channels_last(args: BenchmarkArguments) -> str:
    """A step with the channels innermost in memory, as the encoder has them, and outermost."""

    def change(model: CSIModel) -> Callable:
        model.backbone.memory_format = torch.contiguous_format
        return model

    return step_in_two_ways(args, "channels_last", change, "channels outermost")


def bfloat16(args: BenchmarkArguments) -> str:
    """A step under autocast, as --bf16 trains."""
    return step_in_two_ways(args, "fp32", torch.autocast("cpu", torch.bfloat16), "bf16 autocast")


def compiled(args: BenchmarkArguments) -> str:
    """A step with the compiled encoder, where nearly all of the work is. The warm-up compiles, and needs a C++ compiler."""

    def change(model: CSIModel) -> Callable:
        model.backbone.compile()
        return model

    return step_in_two_ways(args, "plain", change, "encoder compiled")


def trainer(args: BenchmarkArguments) -> str:
    """A run of the trainer, and a bare loop that does the same: data loader, AdamW, clipping, schedule, average of the weights."""
    from datasets import Dataset
    from diffusers.training_utils import EMAModel

    batch = max(2, args.batch_size // 4)  # a step of about 50 ms on two cores
    start = CSIModel(CSIConfig(image_size=args.image_size))
    processor = AnomalyImageProcessor.for_images(args.image_size, start.config.num_channels)
    arrays = np.random.default_rng(0).integers(0, 256, (TRAINED_STEPS * batch, args.image_size, args.image_size), dtype=np.uint8)
    dataset = Dataset.from_dict({"image": [PIL.Image.fromarray(array) for array in arrays]})
    # Read already: decoding is the same work in both, and would hide what the trainer adds.
    dataset = [{"pixel_values": row["pixel_values"], "labels": 0} for row in prepare(dataset, processor)]

    def trained() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = AnomalyTrainingArguments(
                output_dir=folder, max_steps=TRAINED_STEPS, per_device_train_batch_size=batch, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            run = AnomalyTrainer(copy.deepcopy(start), settings, train_dataset=dataset)
            run.remove_callback(PrinterCallback)
            return run.train().metrics["train_runtime"]

    def looped() -> float:
        settings = AnomalyTrainingArguments
        model = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINED_STEPS)
        average = EMAModel(model.parameters(), decay=settings.ema_decay, foreach=True)
        loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, collate_fn=collate)
        begin = time.perf_counter()
        for images in loader:
            model(**images).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(model.parameters())
        return time.perf_counter() - begin

    ours, bare = (1e3 * total / TRAINED_STEPS for total in alternately(trained, looped, args.repeats))
    what = f"training step of {batch} images, CSI: AnomalyTrainer (A), a bare loop that does the same (B)"
    return table_row(what, "ms", ours, bare, digits=1)


def contrastive_loss(args: BenchmarkArguments) -> str:
    """Loss and gradient of DIA's projections by autograd of the formula, and as the package has it."""
    z = [torch.randn(4, 8 * args.batch_size, 128, requires_grad=True) for _ in range(3)]
    views = z[0].shape[:2].numel()

    def formula():
        rows = F.normalize(torch.cat([branch.flatten(0, 1) for branch in z]), dim=1)
        similarities = (rows[: 2 * views] @ rows.T / 0.5).fill_diagonal_(float("-inf"))
        positive = torch.arange(2 * views).roll(views)
        return F.cross_entropy(similarities, positive)

    def differentiate(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        for branch in z:
            branch.grad = None
        loss().backward()
        return z[0].grad

    ours = partial(amplified_nt_xent, *z, temperature=0.5)
    torch.testing.assert_close(differentiate(ours), differentiate(formula), rtol=1e-3, atol=1e-7)
    a, b = alternately(lambda: seconds(lambda: differentiate(formula)), lambda: seconds(lambda: differentiate(ours)), args.repeats)
    peaks = [peak_bytes(lambda loss=loss: differentiate(loss)) / 2**20 for loss in (formula, ours)]
    what = (
        f"contrastive loss of {z[0].shape[1]} images, 12 views each, with gradient: autograd of the formula (A, {peaks[0]:.0f} MiB), "
        f"the package's (B, {peaks[1]:.0f} MiB)"
    )
    return table_row(what, "ms", 1e3 * a, 1e3 * b)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that tensors made during the action hold at once on the CPU, temporary ones inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def two_processes(args: BenchmarkArguments) -> str:
    """The same training in one process and in two, with the same images a step and as many threads for each process: 2 at best."""
    threads, batch = max(1, os.cpu_count() // 2), args.batch_size // 2 * 2

    def measure(processes: int) -> float:
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command += [str(Path(__file__).with_name("train_dia.py")), "--dataset_name=digits", "--dissolver=none", "--disable_tqdm=true"]
            command += [f"--image_size={args.image_size}", f"--max_steps={TRAINED_STEPS}", "--save_strategy=no", "--num_test_views=1"]
            command += [f"--per_device_train_batch_size={batch // processes}", f"--output_dir={folder}", "--report_to=none"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not (match := re.search(r"'train_runtime': '?([\d.]+)", done.stdout)):
            raise InputError(f"training in {processes} processes failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return 1e3 * float(match[1]) / TRAINED_STEPS

    one, two = alternately(lambda: measure(1), lambda: measure(2), args.repeats, warm_up=False)
    what = f"training step of {batch} images, CSI, threads a process: {threads}; one process (A), two (B)"
    return table_row(what, "ms", one, two)


ROWS: dict[str, Callable[[BenchmarkArguments], str]] = {
    "training_step": training_step,
    "trainer": trainer,
    "channels_last": channels_last,
    "bfloat16": bfloat16,
    "compiled": compiled,
    "contrastive_loss": contrastive_loss,
    "two_processes": two_processes,
    "scoring": scoring,
    "pipeline": lambda args: pipeline(small_dia(args), args),
    # A forward pass of milliseconds, beside which all else counts.
    "small_pipeline": lambda args: pipeline(SharedAEModel(SharedAEConfig(image_size=args.image_size)), args),
    "bank_search": bank_search,
    "memory": memory,
    "pixel_metrics": pixel_metrics,
    "import_time": import_time,
}


def hardware() -> str:
    """The processor's name, as far as the system tells it, and how many cores there are."""
    facts = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", facts.read_text(encoding="utf-8", errors="replace")) if facts.is_file() else None
    return f"{os.cpu_count()} cores of {match[1] if match else platform.processor() or 'unknown make'} ({platform.machine()})"


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    check_output("--output", args.output)
    lines = ["| what | A | B | ratio A/B |", "|---|---|---|---|"]
    print(*lines, sep="\n")
    for name in args.rows or ROWS:
        torch.manual_seed(0)
        lines.append(ROWS[name](args))
        print(lines[-1], flush=True)
    facts = f"{hardware()}, torch {torch.__version__}, threads: {torch.get_num_threads()}, {datetime.date.today()}"
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    lines += ["", f"{args.image_size}×{args.image_size} pixels, medians of {args.repeats} in turns; {facts}; `{command}`."]
    print(*lines[-2:], sep="\n")
    if args.output is not None:
        with writing(args.output) as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
