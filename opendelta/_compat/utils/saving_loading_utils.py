"""`opendelta.utils.saving_loading_utils` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "save_finetuned and from_finetuned are methods of the deltas")
