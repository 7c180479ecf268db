from typing import Literal

from huggingface_hub.dataclasses import strict

from ..csi.configuration_csi import CSIConfig


@strict
class DIAConfig(CSIConfig):
    """Configuration of `DIAModel`: CSI's, and the dissolved branch D.

    Args:
        similarity_design: `"a"`, every dissolved view is a negative of every anchor (Fig. 3), or `"b"`, an anchor's own dissolved twin of the same shift
            is left out of the denominator (appendix C.2).
        dissolver: the kind of dissolver that trained the detector, for the record; scoring does not need it.
        dissolver_settings: its settings, for the record.
    """

    model_type = "dia_anomaly"

    similarity_design: Literal["a", "b"] = "a"
    dissolver: str | None = None
    dissolver_settings: dict | None = None
