"""One HTML page on how a detector does on a dataset."""

from .writing import write_report

__all__ = ["write_report"]
