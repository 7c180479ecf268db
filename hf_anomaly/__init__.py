"""Image anomaly detection as ordinary Hugging Face work.

Importing the package registers its detectors with transformers' Auto classes and pipelines, see `registry`; what needs diffusers, datasets, kornia,
evaluate or scikit-learn is imported when it is used.
"""

import os
import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING

from .version import __version__

# Threads of torch's CPU kernels spin while they wait for each other, for milliseconds: two processes on the same cores then take ten times as long as one
# after the other (model_cards/results/speed.md). Read when torch is first imported.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"

if TYPE_CHECKING:  # editors and type checkers do not follow _HOMES
    from .backbones.configuration_small_resnet import SmallResNetConfig as SmallResNetConfig
    from .backbones.modeling_small_resnet import SmallResNetBackbone as SmallResNetBackbone
    from .data import load_one_class as load_one_class
    from .data import prepare as prepare
    from .detector import AnomalyDetector as AnomalyDetector
    from .detector import AnomalyDetectorConfig as AnomalyDetectorConfig
    from .detector import AnomalyDetectorOutput as AnomalyDetectorOutput
    from .detectors.addp.configuration_addp import ADDPConfig as ADDPConfig
    from .detectors.addp.modeling_addp import ADDPForPreTraining as ADDPForPreTraining
    from .detectors.addp.modeling_addp import ADDPModel as ADDPModel
    from .detectors.csi.configuration_csi import CSIConfig as CSIConfig
    from .detectors.csi.modeling_csi import CSIModel as CSIModel
    from .detectors.dia.configuration_dia import DIAConfig as DIAConfig
    from .detectors.dia.modeling_dia import DIAModel as DIAModel
    from .detectors.shared_ae.configuration_shared_ae import SharedAEConfig as SharedAEConfig
    from .detectors.shared_ae.modeling_shared_ae import SharedAEModel as SharedAEModel
    from .dissolving import DISSOLVERS as DISSOLVERS
    from .dissolving import DiffusionDissolver as DiffusionDissolver
    from .dissolving import Dissolver as Dissolver
    from .dissolving import GaussianDissolver as GaussianDissolver
    from .dissolving import IdentityDissolver as IdentityDissolver
    from .dissolving import MedianDissolver as MedianDissolver
    from .dissolving import ResizeDissolver as ResizeDissolver
    from .dissolving import dissolve_dataset as dissolve_dataset
    from .errors import HubError as HubError
    from .errors import InputError as InputError
    from .errors import NotFittedError as NotFittedError
    from .image_processing import AnomalyImageProcessor as AnomalyImageProcessor
    from .metrics import image_metrics as image_metrics
    from .pipeline import AnomalyDetectionPipeline as AnomalyDetectionPipeline
    from .registry import DETECTORS as DETECTORS
    from .training import AnomalyTrainer as AnomalyTrainer
    from .training import AnomalyTrainingArguments as AnomalyTrainingArguments
    from .training.runs import train_detector as train_detector
    from .visualization import overlay_anomaly_map as overlay_anomaly_map

_HOMES = {  # public name -> its module
    "ADDPConfig": "detectors.addp.configuration_addp",
    "ADDPForPreTraining": "detectors.addp.modeling_addp",
    "ADDPModel": "detectors.addp.modeling_addp",
    "AnomalyDetectionPipeline": "pipeline",
    "AnomalyDetector": "detector",
    "AnomalyDetectorConfig": "detector",
    "AnomalyDetectorOutput": "detector",
    "AnomalyImageProcessor": "image_processing",
    "CSIConfig": "detectors.csi.configuration_csi",
    "CSIModel": "detectors.csi.modeling_csi",
    "DETECTORS": "registry",
    "DIAConfig": "detectors.dia.configuration_dia",
    "DIAModel": "detectors.dia.modeling_dia",
    "HubError": "errors",
    "InputError": "errors",
    "NotFittedError": "errors",
    "SharedAEConfig": "detectors.shared_ae.configuration_shared_ae",
    "SharedAEModel": "detectors.shared_ae.modeling_shared_ae",
    "SmallResNetBackbone": "backbones.modeling_small_resnet",
    "SmallResNetConfig": "backbones.configuration_small_resnet",
    "AnomalyTrainer": "training",
    "AnomalyTrainingArguments": "training",
    "train_detector": "training.runs",
    "DISSOLVERS": "dissolving",
    "DiffusionDissolver": "dissolving",
    "Dissolver": "dissolving",
    "GaussianDissolver": "dissolving",
    "IdentityDissolver": "dissolving",
    "MedianDissolver": "dissolving",
    "ResizeDissolver": "dissolving",
    "dissolve_dataset": "dissolving",
    "load_one_class": "data",
    "prepare": "data",
    "image_metrics": "metrics",
    "overlay_anomaly_map": "visualization",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        import_module(".registry", __name__)  # who asks for a name before a command has registered gets it registered, too
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is not imported yet, too: completion shows what there is."""
    return sorted({*__all__, *globals()} - {"PurePath", "TYPE_CHECKING", "import_module", "os", "sys"})


# The console script imports this package before it knows what it is asked for. torch and transformers take seconds: `hf-anomaly --help` must not wait for
# them, so there `cli` registers, once it knows a command that needs it.
if PurePath(sys.argv[0] if sys.argv else "").stem != "hf-anomaly":
    import_module(".registry", __name__)
