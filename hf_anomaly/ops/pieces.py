"""Taking many rows a few at a time."""

import torch


def pieces(count: int, budget: int, row: int) -> list[slice]:
    """Slices that part `count` rows of `row` elements each, so that one has `budget` elements at most, but at least one row.

    While `torch.export` or `torch.compile` traces, it is one slice of all rows: a number of slices would bind the graph to a batch size. `len` of a batch
    would do so, too: give its `shape[0]`.
    """
    if torch.compiler.is_compiling():
        return [slice(0, None)]
    size = max(1, budget // max(1, row))
    return [slice(start, start + size) for start in range(0, max(1, count), size)]
