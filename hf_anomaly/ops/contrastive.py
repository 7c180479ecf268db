"""The contrastive loss of DIA, and of CSI without the dissolved branch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_anomaly.errors import InputError
from hf_anomaly.ops.distributed import gather_rows, world


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
        divisor: "anchors" divides by the number of anchors, 2·B·K, as Eq. 6 is a mean over anchors; "views" by the number of
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
    with torch.autocast(views.device.type, enabled=False):
        views = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=1)
        anchors = views[: 2 * branch] / temperature
        positive = (anchors * views[: 2 * branch].roll(branch, dims=0)).sum(dim=1)  # A_ik with B_ik, B_ik with A_ik
        logits = anchors @ gather_rows(views).T  # (anchors, views of the global batch)

    # The block of columns of this rank starts at rank·|views|; in it A has columns 0 … KB−1, B the next KB, D the last KB.
    first = world()[0] * len(views)
    anchor = torch.arange(2 * branch, device=views.device)
    excluded = [first + anchor]  # j ≠ a
    if exclude_twins:
        excluded.append(first + 2 * branch + anchor % branch)
    # In place: the product's backward does not need its values, so the (anchors × views) matrix exists once.
    logits = logits.scatter_(1, torch.stack(excluded, dim=1), float("-inf"))
    loss = (logits.logsumexp(dim=1) - positive).sum()
    return loss / (2 * branch if divisor == "anchors" else len(views))
