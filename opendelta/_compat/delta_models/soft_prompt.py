"""`opendelta.delta_models.soft_prompt` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta.methods.soft_prompt import SoftPromptConfig, SoftPromptLayer, SoftPromptModel

__all__ = ["SoftPromptConfig", "SoftPromptLayer", "SoftPromptModel"]
__getattr__ = refuses(__name__)
