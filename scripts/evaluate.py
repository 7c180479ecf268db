"""Scores a dataset with a saved detector and writes the same JSON as training does, but for the facts of the training.

The split hash covers the evaluated rows alone: no training data is needed.

python scripts/evaluate.py --model runs/dia-digits --dataset_name digits
"""

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_anomaly.data import collate
from hf_anomaly.training import DataArguments, parse_arguments
from hf_anomaly.training.runs import evaluate_detector, load_detector, load_splits, run_script, write_json

logger = logging.getLogger("hf_anomaly.evaluate")


@dataclass
class EvaluationArguments:
    """What is evaluated, and how."""

    model: str = field(metadata={"help": "Folder or Hub id of a saved detector."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    output: str | None = field(default=None, metadata={"help": "Also write the JSON to this file."})
    batch_size: int = field(default=64, metadata={"help": "Images scored at once."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Device to score on."})


def main() -> None:
    started = time.time()
    args, data_args = parse_arguments(EvaluationArguments, DataArguments, description=__doc__)
    model, processor = load_detector(args.model, args.revision)
    model.to(args.device)
    trained_on = model.config.normal_label
    data_args.normal_label = data_args.normal_label or trained_on
    splits = load_splits(data_args, evaluation_only=True)
    if trained_on not in (None, splits.normal_label):
        logger.warning("Normal is %r here, but the detector was trained on %r", splits.normal_label, trained_on)

    def score(dataset):
        return model.score(DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate))

    results = evaluate_detector(model, processor, splits, score)
    results["seconds"] = round(time.time() - started, 1)
    if args.output is not None:
        write_json(Path(args.output), results)
    print(json.dumps(results, indent=2, sort_keys=True, allow_nan=False))


if __name__ == "__main__":
    run_script(main)
