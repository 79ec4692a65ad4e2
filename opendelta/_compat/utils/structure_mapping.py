"""`opendelta.utils.structure_mapping` of OpenDelta 0.3: common names of a model's modules."""

from typing import Any

from torch import nn

from opendelta._backbone.roles import roles
from opendelta._compat.gone import refuses

__all__ = ["CommonStructureMap"]
__getattr__ = refuses(
    __name__,
    dict.fromkeys(
        ["Mappings", "CoreMappings", "transform", "bert_mapping", "roberta_mapping", "t5_mapping"],
        "roles are found in any architecture: use opendelta.roles(model)",
    ),
)


class CommonStructureMap:
    """The roles of a model's modules, which OpenDelta 0.3 read from a table for each architecture.

    Attributes:
        mapping: {full name of a module: its role}; see `opendelta.roles`.
    """

    def __init__(self, backbone_model: nn.Module, *_: Any, **__: Any) -> None:
        self.mapping = roles(backbone_model)

    @classmethod
    def load(cls, backbone_model: nn.Module, *_: Any, **__: Any) -> "CommonStructureMap":
        """Return the map of a model."""
        return cls(backbone_model)

    def transform(
        self, org_key: str, strict: bool = True, warning: bool = False
    ) -> tuple[str | None, None, None]:
        """Return the role of the module with the full name `org_key`, and two times None.

        OpenDelta 0.3 returned three values; the last two were for modules that do not exist.

        Args:
            strict: without a role its place has None. False: `org_key`.
        """
        return self.mapping.get(org_key, None if strict else org_key), None, None

    def __repr__(self) -> str:
        return f"CommonStructureMap({self.mapping})"
