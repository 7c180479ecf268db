"""What lets N processes train as one: rows of the global batch drawn alike and gathered with gradient, equal buffers, and a cache that one of them writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; `(0, 1)` without an initialised `torch.distributed` process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def local_main_process_first() -> Iterator[None]:
    """The first process of a machine does what is in the block, then the others.

    Unlike with `PartialState.local_main_process_first` they go on when it fails, too: they then report the same error, not a lost connection.
    """
    from accelerate import PartialState

    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def draw_rows(draw: Callable[[int], Tensor], batch_size: int) -> Tensor:
    """This rank's rows of a random draw for the global batch.

    Every process must be seeded alike; each then draws all rows and keeps its own, so that W processes with batches of B draw
    exactly what one process with a batch of W·B draws.

    Args:
        draw: maps a number of rows n to a tensor of shape (n, …).
        batch_size: rows per process, B, the same on every process.

    Returns:
        Tensor of shape (B, …): rows `rank·B … (rank+1)·B − 1` of `draw(W·B)`.
    """
    rank, world_size = world()
    return draw(world_size * batch_size)[rank * batch_size : (rank + 1) * batch_size]


def gather_rows(x: Tensor) -> Tensor:
    """All-gather along dim 0, in rank order, with gradient to every process.

    Args:
        x: (B, …), of the same shape and dtype on every process.

    Returns:
        (W·B, …). The gradient that reaches `x` is the *sum* over the processes of their gradients with respect to its rows, so
        that the mean over processes that DDP takes afterwards is the gradient of the mean of their losses. `x` itself if W = 1.
    """
    return x if world()[1] == 1 else _GatherRows.apply(x)


def share_buffers(module: torch.nn.Module) -> None:
    """Every process takes the buffers of process 0, such as running statistics, which DDP itself does only before a forward in training."""
    if world()[1] > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class _GatherRows(torch.autograd.Function):
    # torch has two gathers with gradient: torch.distributed.nn.functional.all_gather, deprecated in 2.13, and the one in the
    # private _functional_collectives, renamed between versions. These few lines use public collectives only.

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, x.contiguous())
        return torch.cat(shards)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        # A reduce-scatter by way of all-reduce, which every backend has. Clone: autograd may share this tensor with others.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
