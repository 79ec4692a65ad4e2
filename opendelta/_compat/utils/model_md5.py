"""`opendelta.utils.model_md5` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(
    __name__, "a folder holds a fingerprint of its backbone, and opendelta.snapshot compares models"
)
