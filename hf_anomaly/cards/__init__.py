"""The model card: filled from the run."""

from .card import write_card

__all__ = ["write_card"]
