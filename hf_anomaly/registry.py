"""The detectors, and their registration with transformers' Auto classes and pipelines."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining
from transformers.pipelines import PIPELINE_REGISTRY

from .backbones.configuration_small_resnet import SmallResNetConfig
from .backbones.modeling_small_resnet import SmallResNetBackbone
from .detectors.addp.configuration_addp import ADDPConfig
from .detectors.addp.modeling_addp import ADDPForPreTraining, ADDPModel
from .detectors.csi.configuration_csi import CSIConfig
from .detectors.csi.modeling_csi import CSIModel
from .detectors.dia.configuration_dia import DIAConfig
from .detectors.dia.modeling_dia import DIAModel
from .detectors.shared_ae.configuration_shared_ae import SharedAEConfig
from .detectors.shared_ae.modeling_shared_ae import SharedAEModel
from .image_processing import AnomalyImageProcessor
from .pipeline import TASK, AnomalyDetectionPipeline

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
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=AnomalyDetectionPipeline, pt_model=AutoModel, type="image")
