"""Fills the card's template from a trained detector and its results."""

import json
import os
import re
import shlex
from pathlib import Path

from transformers import PreTrainedModel

from ..version import __version__
from .figures import FIGURES, FOLDER
from .merging import METRICS, TASK_NAME

TEMPLATE = Path(__file__).with_name("template.md")
PRETRAINING_TEMPLATE = Path(__file__).with_name("pretraining.md")


def plain(text: object) -> str:
    """User text (a dataset's name, a label) on one line, without what Markdown or HTML would act on."""
    return re.sub(r"[`<>|\[\]\r\n]", " ", str(text)).strip()


def shown_command(words: list[str]) -> str:
    """A command line that can be published: without tokens, and of local paths only the last part."""
    shown, secret = [], False
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if secret:
            value = "…"
        secret = word.startswith("--") and flag.endswith("token") and not equals
        if flag.endswith("token") and equals:
            value = "…"
        if Path(value).is_absolute():
            value = Path(value).name
        shown.append(f"{flag}{equals}{value}")
    return shlex.join(shown)


def write_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    results: dict | None = None,
    *,
    command: list[str] | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes `README.md` of a detector's folder, whole or not at all. It shows the figures that `write_figures` left there.

    Args:
        model: a detector.
        results: what `eval_results.json` holds; None if nothing is known of data and results.
        command: the words of the command line that made it; tokens and folders are left out of the card.
        repo_id: where the folder will be pushed; the card's code then loads it from there.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    folder = Path(folder)
    config, known = model.config, results is not None
    results = results or {"reason": "the detector was not evaluated"}
    defaults = type(config)(image_size=config.image_size, num_channels=config.num_channels).to_dict()
    skip = {
        "hf_anomaly_version",
        "transformers_version",
        "architectures",
        "dtype",
        "bank_size",
        "num_reference_images",
        "num_calibration_scores",
        "anomaly_map_range",
        "calibrated_for",
        "backbone_config",
        "auto_map",
    }
    changed = {k: v for k, v in config.to_dict().items() if k not in skip and not k.startswith("_") and defaults.get(k) != v}
    name = folder.resolve().name
    dataset = plain(Path(results["dataset"]).name) if known else ""
    measured = {key: results[key] for key in METRICS if results.get(key) is not None}
    data = ModelCardData(
        library_name="hf-anomaly",
        pipeline_tag="image-classification",
        tags=["anomaly-detection", config.model_type],
        metrics=[METRICS[key][0] for key in measured] or None,
        model_name=plain(name),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name=TASK_NAME,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=METRICS[key][0],
                metric_name=METRICS[key][1],
                metric_value=round(value, 4),
            )
            for key, value in measured.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=plain(name),
        address=plain(repo_id or name),
        model_class=type(model).__name__,
        dataset=dataset,
        normal_label=plain(results.get("normal_label", "")),
        image_size=config.image_size,
        channels="gray" if config.num_channels == 1 else "RGB",
        known=known,
        results=results,
        rows=[(METRICS[key][1], f"{value:.4f}") for key, value in measured.items()],
        reason=plain(results.get("reason", "")),
        calibrated=model.calibration.is_calibrated,
        false_positive_rate=config.false_positive_rate,
        num_calibration=config.num_calibration_scores,
        threshold=f"{model.calibration.threshold.item():.6g}" if model.calibration.is_calibrated else "",
        settings=json.dumps(changed, indent=2, sort_keys=True, default=str).replace("`", "'"),
        command=plain(shown_command(command or [])),
        figures=[(f"{FOLDER}/{file}", text) for file, text in FIGURES.items() if known and (folder / FOLDER / file).is_file()],
        has_dissolver=(folder / "dissolver" / "unet").is_dir(),
        citation=model.citation,
        version=__version__,
    )
    _save(card, folder)


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
    from huggingface_hub import ModelCard, ModelCardData

    config, name = model.config, Path(folder).resolve().name
    card = ModelCard.from_template(
        ModelCardData(library_name="hf-anomaly", tags=["anomaly-detection", "denoising", config.model_type]),
        template_path=str(PRETRAINING_TEMPLATE),
        title=plain(repo_id or name),
        address=plain(repo_id or name),
        model_class=type(model).__name__,
        channels="gray" if config.num_channels == 1 else "RGB",
        image_size=config.image_size,
        dataset=plain(Path(dataset).name) if dataset else "",
        notes=notes,
        noise=config.noise,
        noise_level=config.noise_level,
        trained="the decoder, with the encoder frozen" if model.encoder_is_frozen else "encoder and decoder",
        citation=model.citation,
        version=__version__,
    )
    _save(card, Path(folder))


def _save(card, folder: Path) -> None:
    temporary = folder / ".README.md.tmp"
    card.save(temporary)
    os.replace(temporary, folder / "README.md")
