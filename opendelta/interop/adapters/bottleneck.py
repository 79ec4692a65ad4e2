"""Translate bottleneck adapters and Compacter: find the module that each adapter is on here.

In the adapters library an adapter stands between a sublayer's output h and the sum h + r, where r
is the sublayer's input. BERT normalises that sum. Options say which of these tensors the adapter
reads, and to which it is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import shown
from ...names import parent
from .selection import check_selection
from .terms import Part

NORM = "LayerNorm"  # the child's name in modules that normalise h + r
INSIDE = {  # roles of the module that returns h, by the name of the library's module in a block
    "attention_adapters": ("attn.proj",),
    "output_adapters": ("ff.w2",),
    "": ("attn.proj", "cross_attn.proj", "ff.w2"),
}
BESIDE = {  # the module that reads r first, by its name in the module around
    "attention_adapters": ("ln_1", "input_layernorm"),
    "output_adapters": ("ln_2", "post_attention_layernorm"),
}
ORDER = ("original_ln_before", "original_ln_after", "residual_before_ln")


def read(part: Part) -> None:
    """Fill in a part that holds tensors of bottleneck adapters."""
    config = part.config
    part.method = "parallel_adapter" if config["is_parallel"] else "adapter"
    if config["phm_layer"]:
        part.method = "compacter"
    groups = part.given.pop("adapters")
    _check_norms(part)
    for path, own in groups.items():
        where = _site(part, path)
        if where in part.sites:
            raise part.error(f"there are two adapters on {where!r}")
        part.sites[where] = (
            _phm(part, own, path) if config["phm_layer"] else _plain(part, own, path)
        )
    check_selection(
        part, {name for path in groups for name in _inside(part, *_around(part, path)[:2])}
    )
    activation = str(config["non_linearity"] or "linear").lower()
    part.options["non_linearity"] = {"leakyrelu": "leaky_relu"}.get(activation, activation)
    if config["phm_layer"]:
        _finish_compacter(part)
        return
    sizes = {own["down_proj.weight"].size(0) for own in part.sites.values()}
    if len(sizes) > 1:
        raise part.refusal("reduction_factor", f"a delta has one size, and here are {sizes}")
    part.options["bottleneck_dim"] = sizes.pop()


def _check_norms(part: Part) -> None:
    config = part.config
    plain = part.method == "adapter"
    for option in ("ln_before", "ln_after"):
        if config[option] and not plain:
            raise part.refusal(option, f"{part.method!r} has no normalisation of its own")
    if config["ln_before"] and config["ln_after"]:
        raise part.refusal("ln_after", "an adapter here has one normalisation, not ln_before too")
    if plain:
        which = "before" if config["ln_before"] else "after" if config["ln_after"] else None
        part.options["layer_norm"] = which


# --------------------------------------------------------------------------------------- the places
def places(part: Part, path: str) -> list[str]:
    """Return the full names of all modules that an adapter at `path` could be on."""
    where, last, norm = _around(part, path)
    whole = [where] if last != "attention_adapters" else []
    return [*_inside(part, where, last), *([norm] if norm else []), *whole]


def _around(part: Part, path: str) -> tuple[str, str, str | None]:
    """Return the module around an adapter, the adapter's name in a block, and the normalisation."""
    head, _, last = path.rpartition(".")
    where, last = (part.resolve(head), last) if last in BESIDE else (part.resolve(path), "")
    norm = f"{where}.{NORM}"
    return where, last, norm if norm in part.backbone.modules else None


def _site(part: Part, path: str) -> str:
    """Return the full name of the module that the adapter at `path` is on.

    A parallel adapter is on a pair of modules: the option `modified_modules` gets both.
    """
    where, last, norm = _around(part, path)
    if part.config["is_parallel"]:
        start = _start(part, where, last, norm)
        part.options.setdefault("modified_modules", []).extend((start, _proj(part, where, last)))
        return start
    before, after, residual = (part.config[option] for option in ORDER)
    if not before and after:
        return _proj(part, where, last)
    if before and after and residual is True:
        if norm is None:
            return _whole(part, where, last)
        if part.method == "compacter":
            raise part.refusal("original_ln_before", "a Compacter here adds to what it reads")
        part.options["residual"] = "input"
        return norm
    if before and not after and not residual:
        return norm or _whole(part, where, last)
    given = ", ".join(f"{option}={shown(part.config[option])}" for option in ORDER[1:])
    raise part.refusal(ORDER[0], f"together with {given} it fits no place of a delta")


def _proj(part: Part, where: str, last: str) -> str:
    """Return the name of the module inside `where` that returns the sublayer's output h."""
    names = _inside(part, where, last)
    if len(names) != 1:
        raise part.error(
            f"{where!r} ({type(part.backbone.modules[where]).__name__}) has {len(names)} modules "
            f"of the roles {', '.join(INSIDE[last])}, so where its adapter goes is not known"
        )
    return names[0]


def _inside(part: Part, where: str, last: str) -> list[str]:
    """Return the names of the modules inside `where` whose role is to return h."""
    roles = INSIDE[last]
    return [n for n, role in part.roles.items() if role in roles and n.startswith(f"{where}.")]


def _whole(part: Part, where: str, last: str) -> str:
    """Return the name of the module that returns h + r."""
    if last == "attention_adapters":
        raise part.refusal(
            "mh_adapter",
            "with original_ln_before it reads the sum of attention and its input, which no module "
            f"of {type(part.backbone.model).__name__} gives",
        )
    return where


def _start(part: Part, where: str, last: str, norm: str | None) -> str:
    """Return the name of the module that reads r first, where a parallel adapter starts."""
    if not part.config["original_ln_after"]:
        raise part.refusal("original_ln_after", "a parallel adapter here leaves the sum as it is")
    around = parent(where)
    if norm is not None:
        names = [f"{around}.self.query", f"{around}.intermediate.dense"]
    else:
        names = [f"{where}.{name}" for name in BESIDE.get(last, ("layer_norm",))]
    for name in names:
        if name in part.backbone.modules:
            return name
    raise part.error(f"there is none of {', '.join(names)}, where a parallel adapter would start")


# -------------------------------------------------------------------------------------- the tensors
def _plain(part: Part, own: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by our names; multiply a learned scale into its up-projection."""
    config = part.config
    out: dict[str, Tensor] = {}
    norms = {"ln_before": "adapter_down.0", "ln_after": "adapter_norm_after"}
    for option, name in norms.items():
        if config[option]:
            out |= {f"norm.{end}": part.take(own, f"{name}.{end}") for end in ("weight", "bias")}
    down = f"adapter_down.{1 if config['ln_before'] else 0}"
    out["down_proj.weight"] = part.take(own, f"{down}.weight", -1, -1)
    out["down_proj.bias"] = part.take(own, f"{down}.bias")
    weight = part.take(own, "adapter_up.weight", -1, -1)
    bias = part.take(own, "adapter_up.bias", weight.size(0))
    scale = _scale(part, own, bias)
    out |= {"up_proj.weight": weight * scale[:, None], "up_proj.bias": bias * scale}
    # the file has the normalisation before the adapter under two names
    part.check_empty((name for name in own if "adapter_norm_before." not in name), path)
    return out


def _scale(part: Part, own: dict[str, Tensor], bias: Tensor) -> Tensor:
    """Return the factor [width] of the up-projection; ones if the scale becomes an option."""
    given = part.config["scaling"]
    if given in ("learned", "channel"):
        size = 1 if given == "learned" else bias.numel()
        return part.take(own, "scaling", size).expand_as(bias)
    factor = part.number("scaling")
    if part.config["ln_after"]:  # the library scales before this normalisation
        return torch.full_like(bias, factor)
    part.options["scaled" if part.config["is_parallel"] else "scaling"] = factor
    return torch.ones_like(bias)


# ---------------------------------------------------------------------------------------- Compacter
def _phm(part: Part, own: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors of a Compacter layer by our names."""
    out = {}
    for theirs, ours in (("adapter_down.0.", "down_sampler."), ("adapter_up.", "up_sampler.")):
        for key in [key for key in own if key.startswith(theirs)]:
            out[ours + _renamed(key.removeprefix(theirs))] = own.pop(key)
    part.check_empty(own, path)
    return out


def _renamed(name: str) -> str:
    """Return our name of a tensor in a hypercomplex linear layer."""
    part = "blocks." if name.startswith("W") else "rule." if name.startswith("phm_rule") else ""
    return part + name


def _finish_compacter(part: Part) -> None:
    """Fill in the options of a Compacter and the tensors that its layers share."""
    config, n = part.config, part.whole("phm_dim")
    if part.number("scaling") != 1:
        raise part.refusal("scaling", "a Compacter here has no scale")
    part.options |= {
        "reduction_factor": part.whole("reduction_factor"),
        "hypercomplex_division": n,
        "factorized_phm": config["factorized_phm_W"],
        "use_bias_up_sampler": config["phm_bias"],
        "use_bias_down_sampler": config["phm_bias"],
    }
    for option in ("learn_phm", "shared_phm_rule", "shared_W_phm", "factorized_phm_rule"):
        part.options[option] = config[option]
    part.options["phm_rank"] = part.whole("phm_rank")
    around, shared = (
        part.backbone.innermost_around(list(part.sites)),
        part.given.pop("shared_parameters", {}),
    )
    for option in ("shared_phm_rule", "shared_W_phm"):
        if config[option] and not shared:
            raise part.refusal(
                option, "what its layers share is not in the file, as the library does not save it "
                "for T5 without its own heads; train with False"
            )  # fmt: skip
    for path, own in shared.items():
        shapes = {way: _sizes(own, way, n) for way in ("down", "up")}
        for name in [*own]:
            _, way, end = (*name.split("_"), "", "")[:3]
            if name.startswith("phm_rule"):
                ours = f"rule.{name}"
            elif way in shapes:
                ours = f"blocks.{shapes[way]}.W" + (f"_{end}" if end else "")
            else:
                continue
            part.others[part.key(around, f"tensors.{ours}")] = own.pop(name)
        part.check_empty(own, path)


def _sizes(own: dict[str, Tensor], way: str, n: int) -> str:
    """Return our name of the shared matrices, such as "768x48": their input and output width."""
    left, right = (own.get(f"W_{way}{end}", own.get(f"W_{way}")) for end in ("_left", "_right"))
    if left is None or right is None or left.ndim != 3 or right.ndim != 3:
        return ""
    return f"{left.size(1) * n}x{right.size(2) * n}"
