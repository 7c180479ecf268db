from typing import Literal

from huggingface_hub.dataclasses import strict

from ..csi.configuration_csi import CSIConfig


@strict
class DIAConfig(CSIConfig):
    """Configuration of `DIAModel`: CSI's, and the dissolved branch D.

    Args:
        similarity_design: `"a"`, every dissolved view is a negative of every anchor (Fig. 3), or `"b"`, an anchor's own dissolved twin of the same shift
            is left out of the denominator (appendix C.2).
        dissolved_views: the augmentation O'' of branch D: `"own"`, drawn by itself, as Eq. 5 has it; or `"shared"`, that of A, so that a view and its dissolved
            twin differ in nothing but what was dissolved, which teaches more (model_cards/results/dia_ablation.md). Files that lack the field mean `"own"`.
        dissolver: the kind of dissolver that trained the detector, for the record; scoring does not need it.
        dissolver_settings: its settings, for the record.
    """

    model_type = "dia_anomaly"

    fields_before = {**CSIConfig.fields_before, "dissolved_views": "own"}

    similarity_design: Literal["a", "b"] = "a"
    dissolved_views: Literal["own", "shared"] = "shared"
    dissolver: str | None = None
    dissolver_settings: dict | None = None
