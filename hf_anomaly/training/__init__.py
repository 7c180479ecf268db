"""Training with `transformers.Trainer`: arguments, trainers, and the whole run from a dataset to a saved detector."""

from .arguments import AnomalyTrainingArguments, DataArguments, DenoisingTrainingArguments, EvaluationDataArguments, parse_arguments
from .trainers import AnomalyTrainer, DenoisingTrainer, ReproducibleTrainer

__all__ = [
    "AnomalyTrainer",
    "AnomalyTrainingArguments",
    "DataArguments",
    "DenoisingTrainer",
    "DenoisingTrainingArguments",
    "EvaluationDataArguments",
    "ReproducibleTrainer",
    "parse_arguments",
]
