"""Names that the adapters library uses, and `Part`: one method of its checkpoint, half read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..._backbone.roles import roles as roles_of
from ...errors import shown
from .._draft import Draft

WEIGHTS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
# Limits of options: a float32 holds LARGEST, and no model needs a size over LONGEST.
LARGEST, LONGEST = 1e38, 100_000
SLOTS = (
    "adapters", "loras", "prefix_tunings", "prefix_gates", "shared_parameters", "prompt_tunings",
    "refts", "invertible_adapters", "adapter_fusion_layer",
)  # fmt: skip
OLD = {  # {slot of adapter-transformers 1.x: slot of today}
    f"{place}_{kind}_adapters": "adapters"
    for place in ("attention", "layer")
    for kind in ("text_task", "text_lang")
} | {"invertible_lang_adapters": "invertible_adapters"}


@dataclass(frozen=True)
class Terms:
    """The library's names and defaults for one of its methods.

    Attributes:
        name: our name for the method.
        slots: the slots with its tensors.
        defaults: {option: its default} for the options that change the result.
        refused: {option: why no other value than the default can be loaded}.
        free: options that change nothing, or that the tensors show too.
    """

    name: str
    slots: tuple[str, ...]
    defaults: dict[str, Any]
    refused: dict[str, str]
    free: tuple[str, ...] = ()


IN_TRAINING = "it acts in training only: set it to 0 in the file to load the rest"
GATED = "its gate averages over the whole sequence, which no delta does"
COMMON = ("architecture", "init_weights", "init_weights_seed", "leave_out", "dtype")
BOTTLENECK = Terms(
    "adapter",
    ("adapters", "shared_parameters"),
    {"non_linearity": "relu", "original_ln_before": False, "original_ln_after": True,
     "residual_before_ln": True, "ln_before": False, "ln_after": False, "scaling": 1.0,
     "is_parallel": False, "adapter_residual_before_ln": False, "use_gating": False,
     "dropout": 0.0, "stochastic_depth": 0.0, "phm_layer": False, "phm_dim": 4,
     "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True,
     "factorized_phm_rule": False, "learn_phm": True, "phm_rank": 1, "phm_bias": True},
    {"use_gating": GATED, "dropout": IN_TRAINING, "stochastic_depth": IN_TRAINING,
     "adapter_residual_before_ln": "no delta normalises the sum of an adapter and its input"},
    ("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "inv_adapter",
     "inv_adapter_reduction_factor", "invertible_adapter", "phm_c_init", "phm_init_range",
     "hypercomplex_nonlinearity", "MH_Adapter", "Output_Adapter"),
)  # fmt: skip
LORA = Terms(
    "lora",
    ("loras",),
    {"r": 8, "alpha": 8, "dropout": 0.0, "attn_matrices": ["q", "v"], "composition_mode": "add",
     "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None},
    {"use_gating": GATED,
     "vera_d": "this VeRA trains whole matrices, where the paper's trains vectors",
     "vera_b": "this VeRA trains whole matrices, where the paper's trains vectors"},
    ("selfattn_lora", "intermediate_lora", "output_lora"),
)  # fmt: skip
PREFIX = Terms(
    "prefix",
    ("prefix_tunings", "prefix_gates"),
    {"flat": False, "prefix_length": 30, "non_linearity": "tanh", "dropout": 0.0,
     "use_gating": False},
    {"use_gating": GATED, "dropout": IN_TRAINING},
    ("encoder_prefix", "cross_prefix", "bottleneck_size", "shared_gating"),
)  # fmt: skip
FUSION = Terms(
    "fuse",
    ("adapter_fusion_layer",),
    {"query": True, "key": True, "value": True, "query_before_ln": False, "residual_before": False,
     "temperature": False, "dropout_prob": None},
    {"temperature": "it falls from 50 with each forward", "dropout_prob": IN_TRAINING},
    ("regularization", "value_before_softmax", "value_initialized"),
)  # fmt: skip
ARCHITECTURES = {None: BOTTLENECK, "lora": LORA, "prefix_tuning": PREFIX}
UNREAD = {
    "prompt_tuning": "its prompt stands behind the position embeddings, and no delta's does; train "
    "a SoftPromptModel",
    "reft": "its first and last tokens are changed by two different layers",
    "mtl_lora": "several up-projections are mixed",
}


@dataclass
class Part(Draft):
    """One method of a checkpoint on its way to a delta.

    `config` holds the library's options; a missing option has the library's default.

    Attributes:
        given: {slot: {path of the library's module: {name of a tensor: values}}}.
        method: our name of the method.
    """

    given: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    method: str = ""

    @cached_property
    def roles(self) -> dict[str, str]:
        """Return {full name of a module: its role}."""
        return roles_of(self.backbone.model)

    def number(self, option: str) -> float:
        """Return an option that must be a number."""
        value: Any = self.config.get(option)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < LARGEST:
            raise self.refusal(option, "it must be a number")
        return value

    def whole(self, option: str) -> int:
        """Return an option that must be a whole number of at least 1."""
        value = self.number(option)
        if not 1 <= value <= LONGEST or value != int(value):
            raise self.refusal(option, f"it must be a whole number from 1 to {LONGEST:,}")
        return int(value)

    def left_out(self) -> list[Any]:
        """Return the numbers of the layers that the adapter is not on."""
        given = self.config.get("leave_out") or []
        if not isinstance(given, list):
            raise self.refusal("leave_out", "it must be a list of numbers")
        return given

    def resolve(self, path: str) -> str:
        """Return our full name of the module that the library calls `path`.

        Names in a model with a head start with the name of the base model; names in a model without
        a head do not.
        """
        base = getattr(self.backbone.model, "base_model_prefix", "")
        for name in (path, f"{base}.{path}", path.partition(".")[2]):
            if name in self.backbone.modules and (name or not path):
                return name
        raise self.error(
            f"there is no module {shown(path)} in {type(self.backbone.model).__name__}; load it "
            "on the model that it was trained on"
        )

    def take(self, own: dict[str, Tensor], name: str, *shape: int) -> Tensor:
        """Take the tensor `name` out of `own` and return it.

        Args:
            shape: its shape, -1 for any size. No shape given: any shape fits.
        """
        tensor = own.pop(name, None)
        if tensor is None:
            raise self.error(f"{name} is missing; there is {', '.join(sorted(own)) or 'nothing'}")
        fits = len(shape) == tensor.ndim and all(
            n in (-1, size) for n, size in zip(shape, tensor.shape, strict=True)
        )
        if shape and not fits:
            raise self.error(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
        return tensor

    def check_empty(self, own: Iterable[str], where: str) -> None:
        """Raise if tensors are left that no reader took."""
        if left := sorted(own):
            raise self.error(f"nothing is known of {', '.join(left[:3])} on {where!r}")


def slot_pattern(name: str) -> re.Pattern[str]:
    """Return the regular expression for a key of the adapter `name`: where, slot and rest."""
    slots = "|".join((*SLOTS, *OLD))
    return re.compile(rf"(?:(?P<where>.+)\.)?(?P<slot>{slots})\.{re.escape(name)}\.(?P<rest>.+)")
