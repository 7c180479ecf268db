"""Trained detectors side by side: a row for each combination of settings, with mean and standard deviation over its seeds."""

import json
import logging
import os
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..cards.card import are_kinds, evaluated_on, plain
from ..cards.merging import METRICS
from ..errors import InputError
from ..files import markdown_table
from ..loading import load_config, read_results, recorded_results
from ..ops.baselines import TITLES
from ..training.run_record import flat, saved_settings

logger = logging.getLogger(__name__)

TESTED_ON = ("dataset", "normal_label", "num_normal", "num_anomalous")  # of results: detectors compare where these are the same

# What results hold, where they hold it. A metric is 0 to 1.
_KINDS = {
    **dict.fromkeys(METRICS, float | int),
    **dict.fromkeys(TESTED_ON, str | int),
    "steps": int,
    "optimization": dict,
    "command": str,
}

_ROUNDING = 1e-9  # beyond 1, in what earlier versions wrote of detectors without an error

# Flags of a training command that do not change its results, or that its results hold anyhow.
_WITHOUT_EFFECT = re.compile(
    "(seed|max_steps|dataset|dataset_name|dataset_id|data_dir|output_dir|cpu_threads|use_cpu|num_processes|disable_tqdm|report_to|run_name|card_figures"
    "|license|resume_from_checkpoint|push_to_hub|per_device_eval_batch_size)|(log|logging|save|hub|dataloader)_.*"
)


@dataclass(frozen=True)
class Run:
    """The results of one training, or of one baseline.

    Args:
        name: how an error calls it.
        method: such as "DIA".
        results: what `eval_results.json` holds.
        settings: what was chosen for the training, "a.b" for `b` in `a`.

    Raises:
        InputError: the results have no AUROC, or something that no results hold.
    """

    name: str
    method: str
    results: dict
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.results.get("auroc") is None:
            reason = self.results.get("reason") or "its eval_results.json is missing or holds none; give what a training script wrote"
            raise InputError(f"{self.name} has no AUROC: {reason}")
        told = self.results | _tested_on(self.results)
        for name, kind in _KINDS.items():
            value = told.get(name)
            if not isinstance(value, kind | None) or (name in METRICS and value is not None and not 0 <= value <= 1 + _ROUNDING):
                raise InputError(f"{self.name}: {name} is {value!r}, which no evaluation wrote: restore or delete its eval_results.json")
        if not are_kinds(self.results.get("by_class", {})):
            raise InputError(f"{self.name}: by_class is damaged: restore or delete its eval_results.json")

    @property
    def tested_on(self) -> tuple:
        """The values of `TESTED_ON`."""
        return tuple(_tested_on(self.results).values())


def _tested_on(results: dict) -> dict:
    """`TESTED_ON` of results, None where they do not tell."""
    told = results | evaluated_on(results)
    return {key: told.get(key) for key in TESTED_ON}


def read_run(name_or_path: str | os.PathLike) -> Run:
    """A trained detector's run.

    Args:
        name_or_path: folder or Hub id.

    Raises:
        InputError: it is no detector, or was not evaluated.
        HubError: the Hub refused.
    """
    name = os.fspath(name_or_path)
    config, results = load_config(name), recorded_results(name)
    run = Run(name, type(config).__name__.removesuffix("Config"), results)  # refuses what is damaged, before it is read
    division = {key: value for key, value in (results.get("division") or {}).items() if key not in ("seed", "split_hash", "normal_label")}
    settings = saved_settings(config) | {"false_positive_rate": config.false_positive_rate} | division | (results.get("optimization") or {})
    settings = _flags(results.get("command")) | settings  # the settings of a first stage, say, are in the command alone
    if settings.get("data_seed") == results.get("seed"):  # as it is unless somebody says otherwise
        settings.pop("data_seed", None)
    run.settings.update(flat(json.loads(json.dumps(settings))))
    return run


def _flags(command: str | None) -> dict[str, str]:
    """The flags of a training command that may change its results, with their values."""
    try:
        words = shlex.split(command or "")
    except ValueError:  # of a command that somebody wrote
        return {}
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            values = flags.setdefault(flag.replace("-", "_"), [value] if equals else [])
        elif flags:
            values.append(word)
    return {flag: " ".join(values) for flag, values in flags.items() if not _WITHOUT_EFFECT.fullmatch(flag)}


def read_baselines(path: str | os.PathLike) -> list[Run]:
    """The trivial baselines in what `scripts/evaluate.py --baselines true` wrote, with `--output` or with `--record`.

    Raises:
        InputError: it holds none, or is damaged.
    """
    results = read_results(path)
    baselines = results.get("baselines")
    measured = baselines.get("as_they_are") if isinstance(baselines, dict) else None
    if not isinstance(measured, dict):
        raise InputError(f"{path} holds no baselines: give what evaluate --baselines true --output wrote")
    return [Run(str(path), title, {**_tested_on(results), "auroc": measured.get(name)}) for name, title in TITLES.items()]


def compare_runs(runs: Iterable[Run]) -> list[dict]:
    """A row for all runs that differ in nothing but the seed, those on the same test images together.

    Returns:
        For every row `TESTED_ON`, `method`, `settings` (those in which the rows of its method differ), `seeds`, `steps`, and of every metric that all its
        runs have the mean, such as `auroc`, and the sample standard deviation, `auroc_std`, None of one run; likewise `by_class`, the `auroc` and
        `auroc_std` of each class of anomalies, where the test images have several.

    Raises:
        InputError: two runs that should differ in the seed have the same one, or were tested on other images than those they stand beside.
    """
    tables: dict[tuple, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        way = repr((run.method, run.results.get("steps"), sorted(run.settings.items())))
        tables[run.tested_on][way].append(run)
    rows = []
    for tested_on, table in tables.items():
        _check_divisions([run for alike in table.values() for run in alike])
        for alike in table.values():
            first = alike[0]
            differing = _differing(first, [other[0] for other in table.values() if other[0].method == first.method])
            row = dict(zip(TESTED_ON, tested_on, strict=True)) | {"method": first.method, "settings": differing}
            row |= {"seeds": _seeds(alike), "steps": first.results.get("steps")}
            row |= _summary(METRICS, [run.results for run in alike])
            classes = [run.results.get("by_class", {}) for run in alike]
            summaries = {name: _summary(["auroc"], [found.get(name, {}) for found in classes]) for name in classes[0]}
            if by_class := {name: summary for name, summary in summaries.items() if summary}:
                row["by_class"] = by_class
            rows.append(row)
    return rows


def _summary(metrics: Iterable[str], runs: list[dict]) -> dict[str, float | None]:
    """Mean and standard deviation of every metric that all the runs have."""
    summary = {}
    for metric in metrics:
        values = [run.get(metric) for run in runs]
        if None not in values:
            summary |= {metric: statistics.mean(values), f"{metric}_std": statistics.stdev(values) if len(values) > 1 else None}
    return summary


def _differing(run: Run, others: list[Run]) -> dict:
    """The settings in which a run differs from any of the others. Where a run of an earlier version did not record a setting, this is not known."""
    recorded = {other.name: other.results.get("optimization") for other in (run, *others)}
    differing = {
        name: value
        for name, value in run.settings.items()
        if any(other.settings.get(name) != value for other in others if recorded[other.name] or name not in (recorded[run.name] or ()))
    }
    if not recorded[run.name] and any(recorded.values()):
        differing["optimization"] = "not recorded"
    return differing


def _seeds(runs: list[Run]) -> list[int]:
    found: dict[int, Run] = {}
    for run in runs:
        seed = run.results.get("seed")
        if seed in found:
            raise InputError(
                f"{found[seed].name} and {run.name} were trained in the same way with the same seed, {seed}: leave one of them out"
            )
        if seed is not None:  # a baseline has none
            found[seed] = run
    return sorted(found)


def _check_divisions(runs: list[Run]) -> None:
    """Refuses runs whose data have the same protocol, limits and seed, but were divided otherwise: their images differ."""
    found: dict[str, Run] = {}
    for run in runs:
        images = evaluated_on(run.results)
        if division := images.get("division"):
            named = sorted((name, value) for name, value in division.items() if name != "split_hash")
            # The split hash of a training covers the images that it trained on, too; that of an evaluation does not.
            other = found.setdefault(repr((named, images is run.results)), run)
            if evaluated_on(other.results).get("split_hash") != images.get("split_hash"):
                raise InputError(
                    f"{other.name} and {run.name} do not compare: their data have the same name, {images.get('dataset')}, and other images"
                )


def comparison_markdown(rows: list[dict]) -> str:
    """The rows of `compare_runs` as Markdown, a table for each set of test images, and one below it of its classes of anomalies if there are several."""
    tables: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        tables[tuple(row[key] for key in TESTED_ON)].append(row)
    parts = []
    for (dataset, normal, num_normal, num_anomalous), table in tables.items():
        metrics = [metric for metric in METRICS if any(metric in row for row in table)]
        titles, lines = ["method", "settings", "seeds", "steps", *(METRICS[metric][1] for metric in metrics)], []
        for row in table:
            entries = [row["method"], _settings(row), _ranges(row["seeds"]), row["steps"], *(_entry(row, metric) for metric in metrics)]
            lines.append(_cells(entries))
        head = f"{plain(dataset)}: normal is {plain(normal)}; {num_normal} normal and {num_anomalous} anomalous test images"
        parts.append("\n".join([head, "", *markdown_table(titles, lines)]))
        measured = [row for row in table if "by_class" in row]
        if measured:
            titles = ["AUROC", *(plain(" · ".join(filter(None, (row["method"], _settings(row))))) for row in measured)]
            classes = sorted({name for row in measured for name in row["by_class"]})
            lines = [_cells([name, *(_entry(row["by_class"].get(name, {}), "auroc") for row in measured)]) for name in classes]
            parts.append("\n".join(markdown_table(titles, lines)))
    return "\n\n".join(parts)


def _cells(entries: list) -> list[str]:
    return ["–" if entry in ("", None) else plain(entry) for entry in entries]


def _settings(row: dict) -> str:
    return ", ".join(f"{name} {str(value).strip('[]')}" for name, value in row["settings"].items())


def _entry(row: dict, metric: str) -> str:
    if metric not in row:
        return ""
    std = row[f"{metric}_std"]
    return f"{row[metric]:.3f}" + ("" if std is None else f" ± {std:.3f}")


def _ranges(seeds: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
