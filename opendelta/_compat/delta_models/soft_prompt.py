"""`opendelta.delta_models.soft_prompt` of OpenDelta 0.3."""

from opendelta.methods.soft_prompt import SoftPromptConfig, SoftPromptLayer, SoftPromptModel

__all__ = ["SoftPromptConfig", "SoftPromptLayer", "SoftPromptModel"]
