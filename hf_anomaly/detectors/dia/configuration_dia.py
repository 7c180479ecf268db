from typing import Literal

from huggingface_hub.dataclasses import strict

from ...errors import InputError
from ..csi.configuration_csi import CSIConfig


@strict
class DIAConfig(CSIConfig):
    """Configuration of `DIAModel`: CSI's, and the dissolved branch D.

    Args:
        similarity_design: `"a"`, every dissolved view is a negative of every anchor (Fig. 3), or `"b"`, an anchor's own dissolved twin of the same shift
            is left out of the denominator (appendix C.2).
        dissolved_loss_weight: weight of L_dis, which asks of every view whether its image was dissolved; 0 is the paper's loss, and what files of version
            0.1.0 mean that lack the field. See `DIAModel`.
        dissolver: the kind of dissolver that trained the detector, for the record; scoring does not need it.
        dissolver_settings: its settings, for the record.
    """

    model_type = "dia_anomaly"
    fields_before = {**CSIConfig.fields_before, "dissolved_loss_weight": 0.0}

    similarity_design: Literal["a", "b"] = "a"
    dissolved_loss_weight: float | int = 1.0
    dissolver: str | None = None
    dissolver_settings: dict | None = None

    def check(self):
        super().check()
        if self.dissolved_loss_weight < 0:
            raise InputError(f"dissolved_loss_weight must not be negative, got {self.dissolved_loss_weight}")
