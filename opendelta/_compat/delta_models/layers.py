"""`opendelta.delta_models.layers` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "activations are transformers' ACT2FN, layers are in opendelta.author")
