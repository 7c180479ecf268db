"""The contrastive loss of DIA, and of CSI without the dissolved branch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_anomaly.errors import InputError
from hf_anomaly.ops.distributed import gather_rows, world

_PIECE = 2**24  # similarities held at once; 64 MiB in float32


def amplified_nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    z_d: Tensor | None = None,
    *,
    temperature: float = 0.5,
    exclude_twins: bool = False,
    divisor: Literal["anchors", "views"] = "anchors",
) -> Tensor:
    """NT-Xent with a dissolved branch of negatives (Shi et al., "Dissolving Is Amplifying", arXiv 2302.14696, Eq. 6-7).

        L = − (1/divisor) Σ_{(a, p) positive} log( exp(sim(z_a, z_p)/τ) / Σ_{j≠a} exp(sim(z_a, z_j)/τ) )

    with cosine similarity. Anchors are the views in A and B; the positive of A_ik is B_ik and the other way round (same image i,
    same shift k); views in D are never anchors and stand in denominators only. Without D this is CSI's loss (Tack et al.,
    arXiv 2007.08176).

    Under W processes the denominators run over the global batch, with gradient through the gather, and the loss is that of this
    process's anchors: the mean over processes, of the loss as of the gradients (DDP), is what one process with W·B images has.
    Every process must call it with the same shapes.

    Args:
        z_a, z_b: (K, B, d) projections of branches A and B, one per shift k and image i, not normalised.
        z_d: (K, B, d) projections of the dissolved branch D, or None.
        temperature: τ > 0.
        exclude_twins: leave the pair of an anchor with its own dissolved twin (same image, same shift) out of the denominator:
            similarity design (b) of appendix C.2. The default, design (a), is the paper's.
        divisor: "anchors" divides by the number of anchors, 2·B·K, as Eq. 7 is a mean over positive pairs, one an anchor; "views" by the number of
            views, 3·B·K with D and 2·B·K without, as the paper's reference implementation does.

    Returns:
        Scalar, float32, or float64 for float64 projections; half precision and autocast are computed in float32.

    Raises:
        InputError: shapes that differ or are not (K, B, d) with K·B > 0, τ ≤ 0, an unknown divisor, `exclude_twins` without `z_d`.
    """
    if z_a.ndim != 3 or z_a.shape[:2].numel() == 0:
        raise InputError(f"z_a: shape {tuple(z_a.shape)}; pass projections of shape (shifts, images, dimensions), at least one of each")
    for name, z in (("z_b", z_b), ("z_d", z_d)):
        if z is not None and z.shape != z_a.shape:
            raise InputError(f"{name}: shape {tuple(z.shape)} differs from z_a's {tuple(z_a.shape)}; all branches need the same shape")
    if not temperature > 0:
        raise InputError(f"temperature: {temperature} is not positive; the paper uses 0.5")
    if divisor not in ("anchors", "views"):
        raise InputError(f"divisor: {divisor!r} is unknown; choose 'anchors' or 'views'")
    if exclude_twins and z_d is None:
        raise InputError("exclude_twins: there are no dissolved twins without z_d; pass z_d or set exclude_twins=False")

    branch = z_a.shape[:2].numel()  # K·B views
    views = torch.cat([z.flatten(0, 1) for z in (z_a, z_b, z_d) if z is not None])
    views = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=1)
    anchors = views[: 2 * branch] / temperature
    positive = (anchors * views[: 2 * branch].roll(branch, dims=0)).sum(dim=1)  # A_ik with B_ik, B_ik with A_ik

    # The block of columns of this rank starts at rank·|views|; in it A has columns 0 … KB−1, B the next KB, D the last KB.
    first = world()[0] * len(views)
    anchor = torch.arange(2 * branch, device=views.device)
    excluded = [first + anchor]  # j ≠ a
    if exclude_twins:
        excluded.append(first + 2 * branch + anchor % branch)
    with torch.autocast(views.device.type, enabled=False):  # of what is computed here it would round the matrix products alone
        denominators = _SumOfLogSumExp.apply(anchors, gather_rows(views), torch.stack(excluded, dim=1))
    return (denominators - positive.sum()) / (2 * branch if divisor == "anchors" else len(views))


class _SumOfLogSumExp(torch.autograd.Function):
    """Σ_a log Σ_{j not excluded} exp(a·v_j) of anchors (N, d), views (M, d) and excluded columns (N, E): autograd would keep N×M matrices.

    The result is one number, so that its gradient is known but for a factor as soon as the softmax is: it is summed up in the forward pass, a piece of
    the rows after the other, and the memory does not grow with N·M.
    """

    @staticmethod
    def forward(ctx, anchors: Tensor, views: Tensor, excluded: Tensor) -> Tensor:
        rows = max(1, _PIECE // len(views))
        total = anchors.new_zeros(())
        differentiable = any(ctx.needs_input_grad)
        anchor_gradients, view_gradient = [], torch.zeros_like(views)
        for piece, columns in zip(anchors.split(rows), excluded.split(rows), strict=True):
            logits = (piece @ views.T).scatter_(1, columns, float("-inf"))
            denominators = logits.logsumexp(dim=1, keepdim=True)
            total += denominators.sum()
            if differentiable:
                softmax = logits.sub_(denominators).exp_()
                anchor_gradients.append(softmax @ views)
                view_gradient.addmm_(softmax.T, piece)
        if differentiable:
            ctx.save_for_backward(torch.cat(anchor_gradients), view_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        anchor_gradient, view_gradient = ctx.saved_tensors
        return gradient * anchor_gradient, gradient * view_gradient, None
