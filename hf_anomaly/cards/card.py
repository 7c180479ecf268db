"""Fills the card's template from a trained detector and its results."""

import json
import os
import re
import shlex
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import write_file
from ..names import is_hub_id
from ..untrusted import is_ours
from ..version import __version__
from .figures import FIGURES, FOLDER
from .merging import METRICS, NOTED, TASK_NAME, merge_cards, read_card


def plain(text: object) -> str:
    """User text (a dataset's name, a label) on one line, without what Markdown, HTML or a terminal would act on."""
    return "".join(letter if letter.isprintable() and letter not in "`<>|[]" else " " for letter in str(text)).strip()


def _source(dataset: str | None) -> str:
    """What a card calls the images' source: of a path, which is nobody's business, the last part."""
    return plain(Path(dataset or "").name)


def shown_command(words: list[str]) -> str:
    """A command line that can be published: without tokens, and of local paths only the last part."""
    shown, secret, in_flags = [], False, False
    for word in words:
        in_flags = in_flags or word.startswith("--")  # before them is the program itself
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if secret:
            value = "…"
        secret = word.startswith("--") and flag.endswith("token") and not equals
        if flag.endswith("token") and equals:
            value = "…"
        if os.path.isabs(value) or (in_flags and _is_local(value)):
            value = os.path.basename(os.path.abspath(os.path.expanduser(value)))
        shown.append(f"{flag}{equals}{value}")
    return shlex.join(shown)


def _is_local(value: str) -> bool:
    """Whether a flag's value is a path here, and not the id of a repository."""
    return value.startswith(("./", "../", "~")) or value.count("/") > 1 or os.path.exists(value)


def check_licence(license: str | None) -> None:
    """Refuses what is no licence, if one is given.

    Raises:
        InputError: names it.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f"{license!r} is no licence as the Hub spells them, such as apache-2.0, cc-by-4.0 or other")


def check_dataset_id(dataset_id: str | None) -> None:
    """Refuses what is no id of a dataset on the Hub, if one is given.

    Raises:
        InputError: names it.
    """
    if dataset_id is not None and not is_hub_id(dataset_id):
        raise InputError(f"{dataset_id!r} is no id of a Hub dataset, which is organisation/name")


def _card_data(model_type: str, name: str, results: dict, license: str | None, dataset_id: str | None) -> ModelCardData:
    """The YAML at the head of a detector's card; the settings are those of `write_card`."""
    check_licence(license)
    dataset_id = dataset_id or results.get("dataset_id")
    check_dataset_id(dataset_id)
    measured_on = _source(evaluated_on(results).get("dataset"))
    measured = {key: results[key] for key in METRICS if results.get(key) is not None}
    noted = {name: value for name, value in (("license", license), ("datasets", dataset_id and [dataset_id])) if value}
    return ModelCardData(
        license=license,
        library_name="hf-anomaly",
        pipeline_tag="image-classification",
        tags=["anomaly-detection", model_type],
        datasets=[dataset_id] if dataset_id else None,
        metrics=[METRICS[key][0] for key in measured] or None,
        model_name=plain(name),
        **({NOTED: noted} if noted else {}),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name=TASK_NAME,
                dataset_type=measured_on if "evaluated_on" in results else dataset_id or measured_on,
                dataset_name=measured_on,
                metric_type=METRICS[key][0],
                metric_name=METRICS[key][1],
                metric_value=round(value, 4),
            )
            for key, value in measured.items()
        ]
        or None,
    )


def write_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    results: dict | None = None,
    *,
    other_runs: Sequence[dict] = (),
    repo_id: str | None = None,
    license: str | None = None,
    dataset_id: str | None = None,
) -> None:
    """Writes `README.md` of a detector's folder, whole or not at all. It shows the figures that `write_figures` left there; what a person wrote in the
    card that it replaces stays.

    Args:
        model: a detector.
        results: what `eval_results.json` holds; None if nothing is known of data and results.
        other_runs: the same of runs that differ in the seed alone, for the mean and standard deviation.
        repo_id: where the folder will be pushed; the card's code then loads it from there.
        license: of the weights, as the Hub spells it; None keeps the one that a person wrote.
        dataset_id: id on the Hub of the images that it was trained on. By default the one in `results`, if any, unless a person wrote another.

    Raises:
        InputError: other runs that are not like this one, or a bad licence or dataset id.
    """
    folder = Path(folder)
    results = results or {}
    config, division = model.config, results.get("division") or {}
    defaults = type(config)(image_size=config.image_size, num_channels=config.num_channels).to_dict()
    hidden = {*config.recorded_fields, "backbone_config"}
    changed = {k: v for k, v in config.to_dict().items() if k not in hidden and not k.startswith("_") and defaults.get(k) != v}
    name = folder.resolve().name
    _write(
        folder,
        "template.md",
        _card_data(config.model_type, name, results, license, dataset_id),
        [name for name, value in (("license", license), ("datasets", dataset_id)) if value],
        title=plain(name),
        address=plain(repo_id or name),
        model_class=type(model).__name__,
        module=None if is_ours(type(model)) else type(model).__module__,
        dataset=_source(results.get("dataset")),
        normal_label=plain(results.get("normal_label", "")),
        image_size=config.image_size,
        tiles=config.tiles,
        channels="gray" if config.num_channels == 1 else "RGB",
        known="dataset" in results,
        protocol=_protocol(division),
        division_seed=division.get("seed"),
        anomalies_in_training=anomalies_in_training(results),
        results=results,
        evaluated_on=_images_in_words(results["evaluated_on"]) if "evaluated_on" in results else "",
        rows=[(name, _with_interval(results, key)) for key, (_, name) in METRICS.items() if results.get(key) is not None],
        kinds=_table_of_kinds(results),
        runs=_table_of_runs(results, other_runs),
        reason=plain(results.get("reason", "")),
        calibrated=model.calibration.is_calibrated,
        false_positive_rate=config.false_positive_rate,
        num_calibration=config.num_calibration_scores,
        calibrated_on=plain(results.get("calibrated_on", "")),
        threshold=f"{model.calibration.threshold.item():.6g}" if model.calibration.is_calibrated else "",
        settings=json.dumps(changed, indent=2, sort_keys=True, default=str).replace("`", "'"),
        command=plain(results.get("command", "")),
        figures=[(f"{FOLDER}/{file}", text) for file, text in FIGURES.items() if results and (folder / FOLDER / file).is_file()],
        has_dissolver=(folder / "dissolver" / "unet").is_dir(),
        citation=model.citation,
    )


def _with_interval(results: dict, key: str) -> str:
    interval = results.get(f"{key}_interval")
    tail = "" if interval is None else f" ({results['interval_confidence']:.0%} interval {interval[0]:.4f} to {interval[1]:.4f})"
    return f"{results[key]:.4f}{tail}"


def evaluated_on(results: dict) -> dict:
    """Where a detector's results tell on which images they were measured, as `dataset`, `normal_label`, `split_hash` and `division`: those of the training's
    own evaluation split, unless others were recorded since."""
    return results.get("evaluated_on") or results


def _images_in_words(images: dict) -> str:
    """Args: images: what `evaluated_on` gives."""
    normal_label, split_hash = (plain(images.get(name, "?")) for name in ("normal_label", "split_hash"))
    return f"`{_source(images.get('dataset', '?'))}`, normal class `{normal_label}`, split hash `{split_hash}`"


def anomalies_in_training(results: dict) -> int:
    """How many of a detector's training images are anomalies that `contamination` passed off as normal, by its results."""
    division, num_train = results.get("division"), results.get("num_train")
    share = division.get("contamination") if isinstance(division, dict) else None
    known = all(isinstance(value, (int, float)) for value in (share, num_train))
    return round(share * num_train) if known else 0  # as many as `contaminate` drew, which rounds, too


def _protocol(division: dict) -> str:
    """How the images were divided, in words; empty if that is not known."""
    if not division:
        return ""
    words = ["the source's own splits" if division.get("protocol") == "official" else plain(division.get("protocol"))]
    if division.get("classes"):
        classes = ", ".join(sorted({plain(name) for name in division["classes"].values()}))
        words.append(f"of the classes {classes} only" if len(classes) <= 200 else f"of {len(division['classes'])} classes only")
    if division.get("max_train_images") is not None:
        words.append(f"at most {division['max_train_images']} normal images to train on")
    if division.get("group_column"):
        held_out = "test and calibration" if division.get("protocol") == "balanced" else "calibration"
        words.append(f"{held_out} images held out by {plain(division['group_column'])}")
    if division.get("contamination"):
        words.append(f"a contamination of {division['contamination']:g}")
    return ", ".join(words)


def _table_of_kinds(results: dict) -> list[list[str]]:
    """A row for each class of anomalies: name, number of images, AUROC and, if calibrated, the share that is flagged."""
    rows, by_class = [], results.get("by_class", {})
    if not are_kinds(by_class):
        raise InputError("by_class in eval_results.json is not what an evaluation wrote: restore or delete it")
    for name, found in by_class.items():
        flagged = found.get("true_positive_rate_at_threshold")
        auroc = "–" if found["auroc"] is None else f"{found['auroc']:.4f}"
        rows.append([plain(name), str(found["num_images"]), auroc, *([] if flagged is None else [f"{flagged:.4f}"])])
    return rows


def are_kinds(by_class) -> bool:
    """Whether this is what `metrics_by_class` gives."""
    return isinstance(by_class, dict) and all(
        isinstance(found, dict)
        and isinstance(found.get("num_images"), int)
        and all(isinstance(found.get(key), float | int | None) for key in ("auroc", "true_positive_rate_at_threshold"))
        for found in by_class.values()
    )


def _table_of_runs(results: dict, others: Sequence[dict]) -> dict | None:
    """Header and rows of the table of a run and its repetitions with other seeds, mean and standard deviation last; None if there are none."""
    if not others:
        return None
    runs = sorted([results, *others], key=lambda run: run.get("seed") or 0)
    described = [
        {**run, "evaluated_on": (images := evaluated_on(run)).get("dataset"), "evaluated_normal_label": images.get("normal_label")}
        for run in runs
    ]
    for field in ("dataset", "normal_label", "steps", "evaluated_on", "evaluated_normal_label", "num_normal", "num_anomalous"):
        if len(values := {run.get(field) for run in described}) > 1:
            raise InputError(
                f"the runs of one table differ in their seed alone, but their {field} are {', '.join(sorted(map(str, values)))}"
            )
    seeds = [run.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"the runs of one table differ in their seed, but these have {', '.join(map(str, seeds))}")
    measured = {key: [run[key] for run in runs] for key in METRICS if all(run.get(key) is not None for run in runs)}
    rows = [
        (seed, *(f"{values[row]:.4f}" for values in measured.values()), str(runs[row].get("split_hash", ""))[:12])
        for row, seed in enumerate(seeds)
    ]
    spread = [f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" for values in measured.values()]
    return {"header": ["seed", *(METRICS[key][1] for key in measured), "split hash"], "rows": [*rows, ("mean ± std", *spread, "")]}


def write_pretraining_card(
    folder: str | os.PathLike, model: PreTrainedModel, notes: dict, *, dataset: str | None = None, repo_id: str | None = None
) -> None:
    """Writes `README.md` of a folder of pretrained weights, whole or not at all.

    Args:
        model: an `ADDPForPreTraining`.
        notes: `num_images`, `steps`, `batch_size` and `seed` of the pretraining.
        dataset: the name of the images' source.
        repo_id: as in `write_card`.
    """
    config, name = model.config, Path(folder).resolve().name
    _write(
        folder,
        "pretraining.md",
        ModelCardData(library_name="hf-anomaly", tags=["anomaly-detection", "denoising", config.model_type]),
        title=plain(repo_id or name),
        address=plain(repo_id or name),
        model_class=type(model).__name__,
        channels="gray" if config.num_channels == 1 else "RGB",
        image_size=config.image_size,
        tiles=config.tiles,
        dataset=_source(dataset),
        notes=notes,
        noise=config.noise,
        noise_level=config.noise_level,
        trained="the decoder, with the encoder frozen" if model.encoder_is_frozen else "encoder and decoder",
        citation=model.citation,
    )


def write_dissolver_card(
    folder: str | os.PathLike,
    kind: str,
    settings: dict,
    *,
    resolution: int | None = None,
    num_channels: int | None = None,
    notes: dict | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes `README.md` of a dissolver's folder, whole or not at all.

    Args:
        kind, settings: the dissolver's.
        resolution, num_channels: of a diffusion model; None for other kinds.
        notes: of its training, as `dissolver_config.json` holds them.
        repo_id: as in `write_card`.
    """
    name = repo_id or Path(folder).resolve().name
    diffusion, notes = num_channels is not None, notes if isinstance(notes, dict) else {}
    run = notes["run"] if isinstance(notes.get("run"), dict) else {}
    _write(
        folder,
        "dissolver.md",
        ModelCardData(library_name="diffusers" if diffusion else "hf-anomaly", tags=["anomaly-detection", "dissolver", "hf-anomaly"]),
        title=plain(name),
        address=plain(name),
        kind=kind,
        diffusion=diffusion,
        settings=settings,
        resolution=resolution,
        tiles=run["tiles"] if isinstance(run.get("tiles"), int) else 1,
        channels="gray" if num_channels == 1 else "RGB",
        notes=notes,
        dataset=_source(run.get("dataset")),
        normal_label=plain(run.get("normal_label") or ""),
    )


def _write(folder: str | os.PathLike, template: str, data: ModelCardData, given: Collection[str] = (), **facts) -> None:
    """Fills a template, and keeps what a person wrote in the card that is there, except for the fields of the YAML that are `given`."""
    card = ModelCard.from_template(data, template_path=str(Path(__file__).with_name(template)), version=__version__, **facts)
    path = Path(folder, "README.md")
    write_file(path, merge_cards(card.content, read_card(path), given) if path.is_file() else card.content)
