"""`opendelta.utils.delta_center` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(
    __name__,
    "DeltaCenter is closed; load from a folder or the Hugging Face hub, push with push_to_hub",
)
