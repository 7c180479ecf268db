"""What detectors do on a dataset: one HTML page of one, one table of several."""

from .comparing import Run, compare_runs, comparison_markdown, read_baselines, read_run
from .writing import write_report

__all__ = ["Run", "compare_runs", "comparison_markdown", "read_baselines", "read_run", "write_report"]
