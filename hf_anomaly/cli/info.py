"""`hf-anomaly info MODEL`"""

import json
import math
from argparse import Namespace

from ..parsing import Parser


def parse(argv: list[str]) -> Namespace:
    parser = Parser("hf-anomaly info", "Tells what a detector is, on what it was trained, how it is calibrated, and how well it does.")
    parser.add_argument("model", help="folder or Hub id")
    parser.option("revision", "branch, tag or commit of a Hub model")
    return parser.parse(argv)


def run(args: Namespace) -> None:
    from ..loading import load_detector, recorded_results

    model, _ = load_detector(args.model, args.revision)
    facts = describe(model, recorded_results(args.model, args.revision))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {''.join(filter(str.isprintable, value))}")  # labels and names come from elsewhere: no control characters


def describe(model, results: dict) -> dict[str, str]:
    """What there is to say of a detector, line by line.

    Args:
        results: of `eval_results.json`; empty if there are none.
    """
    from ..calibration import least_rate
    from ..cards.card import evaluated_on

    config, calibration = model.config, model.calibration
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "method": f"{type(model).__name__} ({config.model_type})",
        "images": f"{config.images_in_words}; others are converted",
        "parameters": f"{parameters:,}, in {str(model.dtype).removeprefix('torch.')}",
        "anomaly maps": "yes" if model.supports_anomaly_maps else f"no: {model.unsupported_maps_reason}",
        "normal": config.normal_label or "unknown",
        "fitted to" if results.get("steps") == 0 else "trained on": f"{results['dataset']}, {_images_of(results)}"
        if "dataset" in results
        else "unknown: not recorded in eval_results.json",
    }
    if getattr(config, "dissolver", None):
        facts["dissolver"] = f"{config.dissolver} {json.dumps(config.dissolver_settings or {})}"
    if not model.is_fitted:
        facts["reference"] = "none: it is not fitted, and cannot score yet"
    if calibration.is_calibrated:
        n, threshold = calibration.scores.numel(), calibration.threshold.item()
        of = f" of {results['calibrated_on']}" if "calibrated_on" in results else ""
        facts["calibrated"] = f"on {n} held-out normal images{of}, for a false-positive rate of {config.false_positive_rate:g}"
        facts["threshold"] = f"{threshold:g}" if math.isfinite(threshold) else "infinite: too few calibration images, nothing is flagged"
        facts["smallest rate"] = f"{least_rate(n):g}; a lower --false_positive_rate needs more calibration images"
    else:
        facts["calibrated"] = "no: scores rank images, but there are no p-values and no verdicts without a --threshold"
    names = {"auroc": "AUROC", "average_precision": "average precision", "fpr_at_95_tpr": "FPR at 95 % TPR"}
    measured = [f"{title} {results[key]:.4f}" for key, title in names.items() if isinstance(results.get(key), (int, float))]
    if measured:
        known = {"num_normal": "?", "num_anomalous": "?", "dataset": "?", "split_hash": "unknown"} | results | evaluated_on(results)
        images = f"on {known['num_normal']} normal and {known['num_anomalous']} anomalous images of {known['dataset']}"
        facts["results"] = f"{', '.join(measured)}, {images} (split {str(known['split_hash'])[:12]})"
    else:
        facts["results"] = str(results.get("reason") or "none recorded in eval_results.json")
    facts["made by"] = f"hf-anomaly {config.hf_anomaly_version}"
    facts["limits"] = "it knows the images it was trained on: calibrate again for another device or population. Not a medical device."
    return facts


def _images_of(results: dict) -> str:
    from ..cards.card import anomalies_in_training

    number, anomalies = results.get("num_train", "?"), anomalies_in_training(results)
    among = f", {anomalies} of them anomalies taken for normal" if anomalies else ""
    return f"{'a stream of' if number is None else number} images{among}"
