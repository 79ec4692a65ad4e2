"""`opendelta.utils.data_parallel` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "models with deltas are replicated as they are")
