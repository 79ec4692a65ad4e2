"""`opendelta.utils.backend` of OpenDelta 0.3, which has no counterpart."""

from opendelta._compat.gone import refusal

raise refusal(__name__, "BMTrain is not supported; shard with FSDP2 or DeepSpeed ZeRO")
