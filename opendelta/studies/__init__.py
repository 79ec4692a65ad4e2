"""Studies of compositions: which is best at a task, how its deltas interact, a page about it.

The room imports `demo`, `plot` and all rooms below; the package itself, on demand, and `cli` may
import it.
"""

from .comparing import compare
from .comparison import Comparison
from .composition_report import CompositionReport
from .interference_report import InterferenceReport, Overlap, Spaces
from .interfering import interference
from .norms import Norm
from .reporting import report
from .tasks import Task, Texts

__all__ = [
    "Comparison",
    "CompositionReport",
    "InterferenceReport",
    "Norm",
    "Overlap",
    "Spaces",
    "Task",
    "Texts",
    "compare",
    "interference",
    "report",
]
