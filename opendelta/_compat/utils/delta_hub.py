"""`opendelta.utils.delta_hub` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "use delta.push_to_hub('user/name')")
