"""A random choice of a stream whose length nobody knows."""

import torch
from torch import Tensor


class Sample:
    """At most `limit` rows of all that are added, each as likely as any other, in the order in which they came.

    The choice is the same in every process: it depends only on the rows' numbers, not on how they are batched. Never more than 1.5 `limit` rows and those
    of the last call are held.

    Args:
        limit: None: all rows.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self._generator = torch.Generator().manual_seed(0)
        self._keys: list[Tensor] = []  # the rows with the smallest ones stay
        self._rows: dict[str, list[Tensor]] = {}
        self._held = 0

    def add(self, rows: dict[str, Tensor]) -> None:
        """Tensors of the same first dimension; every call gives the same names."""
        count = len(next(iter(rows.values())))
        self._keys.append(torch.rand(count, dtype=torch.float64, generator=self._generator))
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values)
        self._held += count
        if self.limit is not None and self._held > 1.5 * self.limit:
            self._thin()

    def rows(self) -> dict[str, Tensor]:
        """The choice; empty if nothing was added."""
        if self.limit is not None and self._held > self.limit:
            self._thin()
        return {name: torch.cat(parts) for name, parts in self._rows.items()}

    def _thin(self) -> None:
        keys = torch.cat(self._keys)
        kept = keys.argsort()[: self.limit].sort().values
        self._keys, self._held = [keys[kept]], self.limit
        for name, parts in self._rows.items():
            self._rows[name] = [torch.cat(parts)[kept]]
