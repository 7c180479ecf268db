"""The model card: filled from the run, and merged with what a person wrote."""

from .card import check_dataset_id, check_licence, shown_command, write_card, write_dissolver_card, write_pretraining_card
from .figures import remove_figures, write_figures
from .merging import tag_card

__all__ = [
    "check_dataset_id",
    "check_licence",
    "remove_figures",
    "shown_command",
    "tag_card",
    "write_card",
    "write_dissolver_card",
    "write_figures",
    "write_pretraining_card",
]
