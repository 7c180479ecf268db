"""Training with `transformers.Trainer`: arguments, trainers, and the whole run from a dataset to a saved detector."""

from .arguments import AnomalyTrainingArguments, DataArguments, DissolverTrainingArguments, parse_arguments
from .trainers import AnomalyTrainer, DissolverTrainer, ReproducibleTrainer

__all__ = [
    "AnomalyTrainer",
    "AnomalyTrainingArguments",
    "DataArguments",
    "DissolverTrainer",
    "DissolverTrainingArguments",
    "ReproducibleTrainer",
    "parse_arguments",
]
