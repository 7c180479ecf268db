"""Image anomaly detection as ordinary Hugging Face work.

Importing the package registers its detectors with transformers' Auto classes; what needs diffusers, datasets, kornia, evaluate or scikit-learn is
imported when it is used.
"""

from importlib import import_module

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

from .backbones.configuration_small_resnet import SmallResNetConfig
from .backbones.modeling_small_resnet import SmallResNetBackbone
from .detector import AnomalyDetector, AnomalyDetectorConfig, AnomalyDetectorOutput
from .detectors.addp.configuration_addp import ADDPConfig
from .detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from .detectors.csi.configuration_csi import CSIConfig
from .detectors.csi.modeling_csi import CSIModel
from .detectors.dia.configuration_dia import DIAConfig
from .detectors.dia.modeling_dia import DIAModel
from .detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from .detectors.shared_ae.modeling_shared_ae import SharedAEModel
from .errors import HubError, InputError, NotFittedError
from .image_processing import AnomalyImageProcessor
from .version import __version__

# One line a detector.
DETECTORS = {
    ADDPConfig: ADDPModel,
    CSIConfig: CSIModel,
    DIAConfig: DIAModel,
    SharedAEConfig: SharedAEModel,
}

AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig)
AutoBackbone.register(SmallResNetConfig, SmallResNetBackbone)
for _config_class, _model_class in DETECTORS.items():
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)
    AutoImageProcessor.register(_config_class, image_processor_classes={"pil": AnomalyImageProcessor})
AutoModelForPreTraining.register(ADDPConfig, ADDPForPreTraining)

_LAZY = {
    "AnomalyTrainer": "training",
    "AnomalyTrainingArguments": "training",
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

__all__ = [
    "ADDPConfig",
    "ADDPForPreTraining",
    "ADDPModel",
    "AnomalyDetector",
    "AnomalyDetectorConfig",
    "AnomalyDetectorOutput",
    "AnomalyImageProcessor",
    "CSIConfig",
    "CSIModel",
    "DETECTORS",
    "DIAConfig",
    "DIAModel",
    "HubError",
    "InputError",
    "NotFittedError",
    "SharedAEConfig",
    "SharedAEModel",
    "SmallResNetBackbone",
    "SmallResNetConfig",
    "__version__",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
