"""LARS, the optimizer of CSI's and DIA's authors."""

from collections.abc import Callable, Iterable

import torch


class LARS(torch.optim.SGD):
    """SGD with momentum in which each tensor w has a learning rate of its own, η‖w‖ / (‖∇‖ + β‖w‖) times the common one (You, Gitman & Ginsburg, arXiv
    1708.03888, eq. 6 and Algorithm 1). A tensor of zeros, or without gradient, has the common one.

    Args:
        params: tensors.
        lr: the common learning rate.
        momentum: as torch's SGD has it, of the gradients, scaled by their own rates.
        weight_decay: β, which is also part of the gradient.
        trust: η.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3):
        super().__init__(params, lr=lr, momentum=momentum)
        self.decay, self.trust = weight_decay, trust

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        for w in (w for group in self.param_groups for w in group["params"] if w.grad is not None):
            norm, gradient = w.norm(), w.grad.norm()
            rate = self.trust * norm / (gradient + self.decay * norm)
            w.grad.add_(w, alpha=self.decay).mul_(torch.where((norm > 0) & (gradient > 0), rate, 1.0))
        return super().step(closure)

    # For copies and pickles: Optimizer's own holds the groups and their state alone.
    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "decay": self.decay, "trust": self.trust}
