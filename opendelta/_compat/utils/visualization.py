"""`opendelta.utils.visualization` of OpenDelta 0.3."""

from opendelta._compat.gone import refuses
from opendelta._show.tree import Visualization

__all__ = ["Visualization"]
__getattr__ = refuses(__name__, {"ModuleTree": "use opendelta.tree(model)"})
