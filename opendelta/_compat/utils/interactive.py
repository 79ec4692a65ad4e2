"""`opendelta.utils.interactive` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "use opendelta.pick(model)")
