"""`opendelta.utils.file_utils` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(
    __name__,
    "a delta is saved as config.json and model.safetensors; see docs/reference/format.md",
)
