"""Is the false-alarm rate that one asks for the one that one gets? Every detector, on held-out normal images of real data, over many divisions of these.

A trained detector is fixed, and so are its scores of normal images which it neither trained on nor has in its bank. A division draws half of them at random to
calibrate with, and counts how many of the other half are flagged.
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from ..calibration import conformal_rank, conformal_threshold, drift_check
from ..cards.card import shown_command
from ..data import OneClassSplits, image_loader, load_one_class
from ..data.recipes import RECIPES
from ..data.sources import dataset_label
from ..detector import AnomalyDetector, AnomalyDetectorConfig
from ..detectors.addp.configuration_addp import ADDPConfig
from ..detectors.addp.modeling_addp import ADDPForPreTraining
from ..detectors.csi.configuration_csi import CSIConfig
from ..detectors.csi.modeling_csi import CSIModel
from ..detectors.dia.configuration_dia import DIAConfig
from ..detectors.dia.modeling_dia import DIAModel
from ..detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from ..detectors.shared_ae.modeling_shared_ae import SharedAEModel
from ..dissolving import GaussianDissolver
from ..errors import InputError
from ..files import csv_text, read_json, write_file, write_json
from ..image_processing import AnomalyImageProcessor
from ..training import AnomalyTrainingArguments
from ..training.denoising import denoising_arguments, pretrain
from ..training.runs import train_detector
from .budgets import Training, detector_settings
from .running import check_seeds, quiet

TABLE = "calibration"  # its id, for scripts/reproduce.py
RATES = (0.01, 0.05, 0.1)
DIVISIONS = 200
HELD_OUT = 0.5  # of the training split's normal images
MAX_TRAIN = 600  # images; the others of the training split are not looked at
BAND = 3.29  # standard errors: by chance a mean leaves the band once in a thousand times
DATASETS = {"fashion_mnist": "0", "pneumonia_mnist": "0"}  # dataset → what is normal
STEPS = {"smoke": 2, "laptop": 100, "paper": 1000}  # budget → of training

Builder = Callable[[AnomalyImageProcessor, OneClassSplits, AnomalyTrainingArguments], AnomalyDetector]


def _dia(processor, splits, args) -> DIAModel:
    model = DIAModel(DIAConfig(**processor.image_shape))
    model.dissolver = GaussianDissolver()
    return model


def _addp(processor, splits, args) -> AnomalyDetector:
    stage = denoising_arguments(args, "pretrained", learning_rate=args.learning_rate, batch_size=32, steps=args.max_steps)
    return pretrain(ADDPForPreTraining(ADDPConfig(**processor.image_shape)), splits.train, processor=processor, args=stage)


DETECTORS: dict[str, tuple[str, Builder, type[AnomalyDetectorConfig]]] = {
    "csi": ("CSI", lambda processor, *_: CSIModel(CSIConfig(**processor.image_shape)), CSIConfig),
    "dia": ("DIA, Gaussian blur", _dia, DIAConfig),
    "shared_ae": ("SharedAE", lambda processor, *_: SharedAEModel(SharedAEConfig(**processor.image_shape)), SharedAEConfig),
    "addp": ("ADDP", _addp, ADDPConfig),
}


# What is measured, and what theory says of it -------------------------------------------------------------------------------------


def divided_rates(
    scores: np.ndarray,
    *,
    divisions: int = DIVISIONS,
    seed: int | tuple[int, ...] = 0,
) -> np.ndarray:
    """The share of normal images flagged, for each random division and rate of RATES: half of the scores calibrate, the others are counted.

    Args:
        scores: (N,) of held-out normal images.

    Returns:
        (divisions, len(RATES)).
    """
    n = len(scores) // 2
    scores, draw = torch.as_tensor(np.asarray(scores)), np.random.default_rng(seed)
    measured = np.empty((divisions, len(RATES)))
    for division in range(divisions):
        order = draw.permutation(len(scores))
        calibration, normal = scores[order[:n]].sort().values, scores[order[n:]]
        measured[division] = [(normal > conformal_threshold(calibration, rate)).double().mean().item() for rate in RATES]
    return measured


@dataclass(frozen=True)
class Expectation:
    """Of the false-positive rate among m normal images, with the threshold at rank k = ⌈(1 − α)(n + 1)⌉ of n others, all n + m exchangeable and no two scores
    equal: the number flagged is Beta-Binomial(m, n + 1 − k, k), since every order of the n + m scores is equally likely. So it is too when the
    n + m scores are fixed and their division into n and m is random, which is what `divided_rates` does; means over independent divisions then have this mean
    and a variance of one division's over their number, although all divide the same scores.

    Attributes:
        mean: (n + 1 − k)/(n + 1), at most α.
        std: of the rate of one division.
        low, high: between them the rate of one division lies with a probability of at least 95 %.
    """

    mean: float
    std: float
    low: float
    high: float


def expectation(num_calibration: int, num_test: int, rate: float) -> Expectation:
    """Raises InputError: so few calibration scores that nothing is ever flagged."""
    from scipy.stats import betabinom

    rank = conformal_rank(num_calibration, rate)
    if rank > num_calibration:
        raise InputError(f"{num_calibration} calibration scores are too few for a rate of {rate:g}")
    flagged = betabinom(num_test, num_calibration + 1 - rank, rank)
    low, high = flagged.ppf([0.025, 0.975]) / num_test
    return Expectation(float(flagged.mean() / num_test), float(flagged.std() / num_test), float(low), float(high))


@dataclass(frozen=True)
class Finding:
    """A detector at one target rate.

    Attributes:
        mean, std: of the measured rates over the divisions.
        expected: of one division.
        low, high: the band in which the mean lies, but for once in a thousand times.
        inside: the share of divisions within [expected.low, expected.high].
    """

    rate: float
    mean: float
    std: float
    expected: Expectation
    low: float
    high: float
    inside: float

    @property
    def holds(self) -> bool:
        return self.low <= self.mean <= self.high


def findings(measured: np.ndarray, num_calibration: int, num_test: int) -> list[Finding]:
    """Compares `divided_rates` (divisions, len(RATES)) with theory."""
    results = []
    for rate, column in zip(RATES, measured.T, strict=True):
        expected = expectation(num_calibration, num_test, rate)
        margin = BAND * expected.std / math.sqrt(len(column))
        inside = float(((column >= expected.low) & (column <= expected.high)).mean())
        band = expected.mean - margin, expected.mean + margin
        results.append(Finding(rate, float(column.mean()), float(column.std(ddof=1)), expected, *band, inside))
    return results


# The study ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationStudy:
    """Which detectors on which data, and where their scores are kept.

    Attributes:
        output_dir: the scores lie in its `calibration/`.
        data_dir: see `DatasetRecipe.locate`.
        datasets, detectors: names in DATASETS and DETECTORS.
        budget: a name in STEPS.
    """

    output_dir: Path
    data_dir: str | None = None
    datasets: tuple[str, ...] = tuple(DATASETS)
    detectors: tuple[str, ...] = tuple(DETECTORS)
    budget: str = "laptop"
    seed: int = 0

    def pairs(self) -> list[tuple[str, str]]:
        """Each (dataset, detector). Raises InputError: an unknown dataset, detector or budget, or a bad seed."""
        known_ones = (("dataset", self.datasets, DATASETS), ("method", self.detectors, DETECTORS), ("budget", [self.budget], STEPS))
        for what, asked, known in known_ones:
            for name in asked:
                if name not in known:
                    raise InputError(f"table {TABLE} has no {what} {name!r}; it has: {', '.join(known)}")
        check_seeds((self.seed,))
        return [(dataset, detector) for dataset in self.datasets for detector in self.detectors]

    def scores_file(self, dataset: str, detector: str) -> Path:
        return Path(self.output_dir, TABLE, f"{self.budget}-{dataset}-{detector}-seed{self.seed}.json")

    def settings(self, detector: str) -> dict:
        """What scores depend on besides the names that their file's name consists of."""
        return {
            "training": vars(self._training()),
            "held_out": HELD_OUT,
            "max_train_images": MAX_TRAIN,
            "detector": detector_settings(DETECTORS[detector][2]()),
        }

    def _training(self) -> Training:
        return Training(epochs=1, min_steps=STEPS[self.budget], max_steps=STEPS[self.budget], batch_size=32)

    def finished(self, dataset: str, detector: str) -> dict | None:
        """What an earlier run left, see `scores`; None if it left nothing, or was of other settings.

        Raises:
            InputError: the file is damaged.
        """
        path = self.scores_file(dataset, detector)
        if not path.is_file():
            return None
        record = read_json(path)
        return record if record.get("settings") == self.settings(detector) else None

    def scores(self, dataset: str, detector: str, command: list[str]) -> dict:
        """Scores of normal images from a detector that is trained for them, or those of an earlier run.

        Returns:
            `held_out`, of the training split's normal images that were not trained on, and `test`, of the test split's, or [] if there is none;
            `train`, `steps`, `split_hash` and what else tells how they were made.
        """
        if (record := self.finished(dataset, detector)) is not None:
            return record
        path = self.scores_file(dataset, detector)
        recipe = RECIPES[dataset]
        source, started = recipe.locate(self.data_dir), time.time()
        with tempfile.TemporaryDirectory() as folder, quiet():
            splits = load_one_class(
                source, normal_label=DATASETS[dataset], calibration_fraction=HELD_OUT, max_train_images=MAX_TRAIN, seed=self.seed
            )
            processor = AnomalyImageProcessor.for_images(recipe.image_size, splits.num_channels)
            set_seed(self.seed)
            args = self._training().arguments(len(splits.train), self.seed, Path(folder))
            model = DETECTORS[detector][1](processor, splits, args)
            unmeasured = replace(splits, test=None, test_missing_reason="only normal images are looked at")
            results = train_detector(model, processor, unmeasured, args, started=started)
        test = []
        if splits.test is not None:
            normal = splits.test.select(np.flatnonzero(np.asarray(splits.test["label"][:]) == 0))
            test = model.score(image_loader(normal, processor, 64), progress=False)[0].tolist()
        record = {
            "held_out": model.calibration.scores.tolist(),
            "test": test,
            "train": len(splits.train),
            "steps": results["steps"],
            "settings": self.settings(detector),
            "seed": self.seed,
            "split_hash": splits.split_hash,
            "dataset": dataset_label(source),
            "command": command,
        }
        if PartialState().is_main_process:
            write_json(path, record)
        return record

    def run(self, command: list[str]) -> list[Path]:
        """Trains what is not trained yet, divides the scores, and writes `calibration.md` and `calibration.csv` into the output folder.

        Returns:
            The two files.

        Raises:
            InputError: see `pairs`; or a dataset that is not there.
        """
        from tqdm.auto import tqdm

        pairs = self.pairs()
        for dataset in self.datasets:
            RECIPES[dataset].locate(self.data_dir)  # before anything is trained
        records = {pair: self.scores(*pair, command) for pair in tqdm(pairs, desc=TABLE, unit="detector")}
        # Each detector has draws of its own: with the same ones, scores without ties would give all of them the same rates.
        measured = {
            (dataset, detector): divided_rates(
                np.asarray(record["held_out"], dtype=np.float32),
                seed=(self.seed, list(DATASETS).index(dataset), list(DETECTORS).index(detector)),
            )
            for (dataset, detector), record in records.items()
        }
        texts = {
            f"{TABLE}.md": markdown(records, measured, self.budget, self.seed, command),
            f"{TABLE}.csv": divisions_csv(measured),
        }
        if PartialState().is_main_process:
            for name, text in texts.items():
                write_file(Path(self.output_dir, name), text)
        return [Path(self.output_dir, name) for name in texts]


def divisions_csv(measured: dict[tuple[str, str], np.ndarray]) -> str:
    """The false-positive rate of every division, a line each."""
    return csv_text(
        {"dataset": dataset, "detector": detector, "division": division}
        | {f"rate_{rate:g}": f"{share:.6f}" for rate, share in zip(RATES, row, strict=True)}
        for (dataset, detector), rates in measured.items()
        for division, row in enumerate(rates)
    )


def markdown(records: dict, measured: dict, budget: str, seed: int, command: list[str]) -> str:
    """The table of expected and measured rates, and the rates on the test split."""
    lines = [
        "# Calibration: is the false-alarm rate the one that was asked for?",
        "",
        "```bash",
        f"python {shown_command(command)}",
        "```",
        "",
        f"Detectors of {STEPS[budget]} steps (budget {budget}, seed {seed}) on at most {MAX_TRAIN} normal images. Half of the training split's normal",
        "images were held out: neither trained on nor in a bank. Their scores are fixed; "
        f"{DIVISIONS} random divisions calibrate with one half of them and count",
        "how many of the other half are flagged. For n scores that calibrate and m that are counted, the number flagged is",
        "Beta-Binomial(m, n + 1 − k, k) with k = ⌈(1 − α)(n + 1)⌉, of mean (n + 1 − k)/(n + 1); so it is for divisions of fixed scores too, since the",
        f"draw makes every order equally likely. The mean over the divisions lies in the band (± {BAND:g} standard errors) but for once in a thousand times.",
        "",
        "This shows that rank, inequality and ties are right for the scores of each detector; without ties nothing else of the scores matters, and detectors",
        "differ by their draws alone. It says nothing of images from elsewhere: that is the second table.",
        "",
        "| dataset | detector | n + m | target | expected mean, band | measured mean | | std of one division: expected, measured "
        "| divisions in the 95 % interval of one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, detector), rates in measured.items():
        count = len(records[dataset, detector]["held_out"])
        n, m = count // 2, count - count // 2
        for found in findings(rates, n, m):
            lines.append(
                f"| {RECIPES[dataset].title} | {DETECTORS[detector][0]} | {n} + {m} | {100 * found.rate:g} % | "
                f"{100 * found.expected.mean:.2f} %, {100 * found.low:.2f} to {100 * found.high:.2f} | {100 * found.mean:.2f} % | "
                f"{'pass' if found.holds else '**fail**'} | {100 * found.expected.std:.2f}, {100 * found.std:.2f} | {100 * found.inside:.0f} % |"
            )
    lines += [
        "",
        "Here all held-out images calibrate, and the normal images of the source's own test split are counted. Where the drift check (two-sample",
        "Kolmogorov–Smirnov) has a small p, these are not exchangeable with the held-out ones, and the promise does not hold:",
        "",
        f"| dataset | detector | n + m | {' | '.join(f'flagged at {100 * rate:g} %' for rate in RATES)} | drift check: p, the scores are |",
        f"|---|---|---|{'---|' * len(RATES)}---|",
    ]
    for (dataset, detector), record in records.items():
        if record["test"]:
            calibration, test = (torch.tensor(record[name]).sort().values for name in ("held_out", "test"))
            flagged = [f"{100 * (test > conformal_threshold(calibration, rate)).double().mean():.2f} %" for rate in RATES]
            drift = drift_check(test, calibration)
            lines.append(
                f"| {RECIPES[dataset].title} | {DETECTORS[detector][0]} | {len(calibration)} + {len(test)} | {' | '.join(flagged)} | "
                f"{drift.p_value:.2g}, {drift.direction} |"
            )
    lines += ["", "Every division is in [calibration.csv](calibration.csv). The splits:", ""]
    for (dataset, detector), record in records.items():
        ties = len(record["held_out"]) - len(set(record["held_out"]))
        lines.append(
            f"- {RECIPES[dataset].title}, {DETECTORS[detector][0]}: class {DATASETS[dataset]} normal, {record['train']} images trained on, "
            f"{record['steps']} steps, {ties} of {len(record['held_out'])} scores tied; split {record['split_hash'][:12]}"
        )
    return "\n".join([*lines, ""])
