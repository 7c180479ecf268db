"""One optimizer for the phases of an adversarial method."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn


class PhasedOptimizer(torch.optim.Optimizer):
    """Holds one optimizer a phase, each with moments of its own, even for parameters that phases share; `step` takes that of the current `phase`.

    Learning-rate schedules see the parameter groups of all of them, checkpoints their states by the phases' names.

    Args:
        optimizers: phase → its optimizer, in the phases' order.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]):
        # Not Optimizer's own __init__: it would refuse a parameter that is in two groups.
        self.optimizers = optimizers
        self.phase = next(iter(optimizers))

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def defaults(self) -> dict:
        return self.optimizers[self.phase].defaults

    @property
    def state(self) -> dict:
        return self.optimizers[self.phase].state

    def step(self, closure=None):
        return self.optimizers[self.phase].step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])

    # For copies and pickles. Optimizer's own hold groups and state alone, and restoring them hooks `step` of the whole class.
    def __getstate__(self) -> dict:
        return {"optimizers": self.optimizers, "phase": self.phase}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)

    def train(self) -> None:
        self._set_mode("train")

    def eval(self) -> None:
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        """Schedule-free optimizers have modes; the others do not."""
        for optimizer in self.optimizers.values():
            getattr(optimizer, mode, lambda: None)()


@contextmanager
def only(parameters: Iterable[nn.Parameter], model: nn.Module):
    """Inside the block no other parameter of the model requires a gradient."""
    kept = {id(parameter) for parameter in parameters}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
