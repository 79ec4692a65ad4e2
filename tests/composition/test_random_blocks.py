"""Random deltas in random blocks, beside the formula of each block computed by hand in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.nets import IDS, Net, shake

import opendelta
from opendelta import AverageModel, FuseModel, GateModel, composition
from opendelta._layers.base import Acts

pytestmark = pytest.mark.covers("AverageModel", "GateModel", "FuseModel")

LINEAR = ["linear", "bare", "conv1d", "head"]
HIDDEN = ["linear", "conv1d", "embedding", "norm", "pair", "attention"]
KINDS = {  # the method, its options, and the modules that it may be put on
    "lora": (opendelta.LoraModel, {"lora_r": 2}, [*LINEAR, "embedding", "conv2d"]),
    "dora": (opendelta.LoraModel, {"lora_r": 2, "use_dora": True}, ["linear", "bare", "conv2d"]),
    "copy": (opendelta.LoraModel, {"lora_r": 2, "modules_to_save": ["head"]}, LINEAR[:3]),
    "vera": (opendelta.VeraModel, {"r": 3}, LINEAR),
    "loha": (opendelta.LohaModel, {"r": 2}, [*LINEAR, "conv2d"]),
    "lokr": (opendelta.LokrModel, {"r": 2}, LINEAR),
    "fourierft": (opendelta.FourierFTModel, {"n_frequency": 9}, LINEAR),
    "oft": (opendelta.OFTModel, {"oft_block_size": 4}, LINEAR),
    "hra": (opendelta.HRAModel, {"r": 2}, LINEAR),
    "ia3": (opendelta.IA3Model, {}, LINEAR),
    "bitfit": (opendelta.BitFitModel, {}, ["linear", "conv1d", "conv2d", "norm"]),
    "ln_tuning": (opendelta.LNTuningModel, {}, ["norm"]),
    "adapter": (opendelta.AdapterModel, {"bottleneck_dim": 3}, HIDDEN),
    "input_adapter": (opendelta.AdapterModel, {"bottleneck_dim": 3, "residual": "input"}, ["norm"]),
    "low_rank_adapter": (opendelta.LowRankAdapterModel, {"reduction_factor": 2}, HIDDEN),
    "compacter": (opendelta.CompacterModel, {"reduction_factor": 2, "hypercomplex_division": 2},
                  HIDDEN),
    "loreft": (opendelta.LoReftModel, {"low_rank_dimension": 2, "first": 1, "last": 2}, HIDDEN),
    "branch": (opendelta.ParallelAdapterModel, {"bottleneck_dim": 3}, ["linear", "conv1d"]),
    "prefix": (opendelta.PrefixModel, {"prefix_token_num": 2, "reparameterize": False},
               ["attention"]),
}  # fmt: skip


def made():
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------- the reference
class Around:
    """What a module gives: its function of (input, prefixes), and its weights with all that folds.

    It stands for the call that a layer sees, too.
    """

    raw = False

    def __init__(self, module, function, params):
        self.module, self.function, self.params = module, function, params

    def __call__(self, x, prefixes=()):
        return self.function(x, prefixes)


class Reference:
    """The output of a network as the formulas say.

    Args:
        plain: the network without deltas.
        carrier: the network with deltas; only the tensors of their layers are used.
        acting: the handles that act, in their order.
    """

    def __init__(self, plain, carrier, acting):
        self.plain, self.carrier, self.acting, self.handed = plain, carrier, acting, {}

    def output(self, ids):
        site = self.site
        x = site("embedding", ids)
        x = x + site("conv1d", torch.tanh(site("bare", torch.tanh(site("linear", x)))))
        x = x + site("attention", x)
        x = site("norm", site("pair", x))
        x = x + site("conv2d", x[:, None]).mean(1)
        return site("head", x)

    def site(self, where, x):
        module = getattr(self.plain, where)

        def bare(x, prefixes):
            if where == "attention":
                return attention(module, x, prefixes)
            out = module(x)
            return out[0] if isinstance(out, tuple) else out

        def params():
            return {k: v for k, v in module.named_parameters() if k in ("weight", "bias")}

        layers = {}
        for delta in self.acting:
            layer = getattr(self.carrier, where).deltas[delta.name] if has(delta, where) else None
            if layer is not None:
                layers[delta.name] = layer
        ordered = sorted(layers.values(), key=lambda layer: layer.acts is not Acts.INSTEAD)
        inside = {n for ly in ordered if ly.is_block for n in ly.record.config.deltas}
        call = Around(module, bare, params)
        for layer in ordered:
            if layer.record.name not in inside or not joins(layer):
                call = self.around(layer, call, layers) or call
        return call(x)

    def around(self, layer, call, layers):
        """The call with a layer around it; None for a block in which nothing acts."""
        if layer.is_block:
            return self.block(layer, call, layers)
        if layer.acts is Acts.INSTEAD:
            own = dict(layer.stand_in.named_parameters())
            return Around(call.module, lambda x, _: layer.stand_in(x), lambda: own)
        if layer.acts is Acts.WITHIN:
            return Around(
                call.module, lambda x, p: call(x, dict.fromkeys((*p, layer))), call.params
            )
        name = layer.record.name
        if layer.handover is not None and layer.hands_over:

            def start(x, p):
                self.handed[name] = layer.strength() * layer.branch(x)
                return call(x, p)

            return Around(call.module, start, call.params)
        if layer.handover is not None:
            return Around(call.module, lambda x, p: call(x, p) + self.handed[name], call.params)

        def run(x, p):
            beneath = Around(call.module, lambda x, _: call(x, p), call.params)
            return layer(beneath, x)

        def params():
            return layer.fold(call.params()) if layer.folds else call.params()

        return Around(call.module, run, params)

    def block(self, layer, call, layers):
        children = [
            (number, self.around(layers[name], call, layers), layers[name])
            for number, name in enumerate(layer.record.config.deltas)
            if name in layers and joins(layers[name])
        ]
        children = [child for child in children if child[1] is not None]
        if not children:
            return None
        numbers = [number for number, _, _ in children]
        entering = all(self.enters(ly, layers) for _, _, ly in children)

        def run(x, p):
            h = call(x, p)
            handed = dict(self.handed)
            if entering:
                new = x + self.entering(layer, layers, call, x, h)
                self.handed = handed
                return call(new, p)
            z = [child(x, p) - h for _, child, _ in children]
            self.handed = handed
            return h + layer.record.scale * rule(layer, x, h, z, numbers)

        def params():
            before = call.params()
            if layer.record.config.delta_type != "average" or not self.folds(layer, layers):
                return before
            after = dict(before)
            g = weights(layer, numbers)
            for index, (_, child, _) in enumerate(children):
                for key, value in child.params().items():
                    change = value - before[key]
                    after[key] = after[key] + layer.record.scale * g[index] * change
            return after

        return Around(call.module, run, params)

    def folds(self, layer, layers):
        if not layer.is_block:
            return layer.folds
        inside = [layers[n] for n in layer.record.config.deltas if n in layers]
        inside = [ly for ly in inside if joins(ly) and not self.empty(ly, layers)]
        average = layer.record.config.delta_type == "average"
        return average and all(self.folds(ly, layers) for ly in inside)

    def empty(self, layer, layers):
        inside = (
            [layers[n] for n in layer.record.config.deltas if n in layers]
            if (layer.is_block)
            else [layer]
        )
        return layer.is_block and all(self.empty(ly, layers) for ly in inside if joins(ly))

    def enters(self, layer, layers):
        if not layer.is_block:
            return layer.record.config.delta_type == "adapter" and (
                layer.record.config.residual == "input"
            )
        inside = [layers[n] for n in layer.record.config.deltas if n in layers]
        inside = [ly for ly in inside if joins(ly) and not self.empty(ly, layers)]
        return all(self.enters(ly, layers) for ly in inside)

    def entering(self, layer, layers, call, x, h):
        """What a layer whose change goes into the module adds to its input."""
        if not layer.is_block:
            return layer.record.scale * layer.bottleneck(h)
        inside = [
            (number, layers[name])
            for number, name in enumerate(layer.record.config.deltas)
            if name in layers and not self.empty(layers[name], layers)
        ]
        z = [self.entering(child, layers, call, x, h) for _, child in inside]
        return layer.record.scale * rule(layer, x, h, z, [number for number, _ in inside])


def has(delta, where):
    return where in delta.layers


def joins(layer):
    """True unless it starts a branch to another module, or is a copy in the module's place."""
    return layer.acts is not Acts.INSTEAD and not (layer.hands_over and layer.handover is not None)


def weights(layer, numbers):
    count = len(layer.record.config.deltas)
    every = torch.tensor(layer.record.config.weights or [1 / count] * count, dtype=torch.float64)
    return (every if layer.weight is None else layer.weight)[numbers]


def rule(layer, x, h, z, numbers):
    z = torch.stack(z, -1)  # [..., width, n]
    config = layer.record.config
    if config.delta_type == "average":
        return z @ weights(layer, numbers)
    if config.delta_type == "gate":
        u = x if x.is_floating_point() else h
        logits = (u @ layer.weight.T + layer.bias)[..., numbers] / config.temperature
        k = min(config.top_k or len(numbers), len(numbers))
        least = logits.sort(-1, descending=True).values[..., k - 1, None]
        return (z * shares_of(logits, logits >= least)[..., None, :]).sum(-1)
    query = F.linear(h, layer.query.weight, layer.query.bias)
    keys = torch.einsum("oi,...in->...on", layer.key.weight, z) + layer.key.bias[:, None]
    scores = (query[..., None] * keys).sum(-2)
    mixed = (z * shares_of(scores, torch.ones_like(scores))[..., None, :]).sum(-1)
    return mixed if layer.value is None else mixed @ layer.value.T


def shares_of(scores, taken):
    """The softmax over those that are taken."""
    shares = (scores - scores.amax(-1, keepdim=True)).exp() * taken
    return shares / shares.sum(-1, keepdim=True)


def attention(module, x, prefixes):
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    for layer in prefixes:
        keys, values = layer.keys_and_values()
        k = torch.cat([keys.expand(len(x), -1, -1, -1), k], 2)
        v = torch.cat([values.expand(len(x), -1, -1, -1), v], 2)
    shares = torch.softmax(q @ k.mT / q.size(-1) ** 0.5, -1)
    return (shares @ v).transpose(1, 2).flatten(-2)


# -------------------------------------------------------------------------------- random blocks
class World:
    """A network, deltas in up to three levels of blocks, and what is known of their switches."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.model, self.plain = made(), made()
        self.before = opendelta.snapshot(self.model)
        self.deltas, self.inside = [], set()
        for index in range(self.random.integers(3, 7)):
            kind = self.pick([*KINDS])
            method, options, places = KINDS[kind]
            some = self.some(places, 3)
            if kind == "branch":
                start = self.pick(["linear", "bare", "conv1d", "norm"])
                ends = {"linear": ["linear", "bare"], "bare": ["conv1d"], "conv1d": ["pair"]}
                some = [start, self.pick(ends.get(start, [start]))]
            if kind == "ia3":
                options = {"feedforward_modules": [w for w in some if w == "bare"]}
            delta = method(self.model, modified_modules=some, name=f"d{index}", **options)
            self.deltas.append(shake(delta, seed=index, scale=0.2))
        for index in range(self.random.integers(1, 5)):
            self.add_block(f"b{index}", seed=50 + index)

    def pick(self, items):
        return items[self.random.integers(len(items))]

    def some(self, items, most):
        count = self.random.integers(1, min(most, len(items)) + 1)
        return [items[i] for i in self.random.permutation(len(items))[:count]]

    def depth(self, delta):
        inside = [d for d in self.deltas if d.name in delta.config.children]
        return 1 + max(map(self.depth, inside), default=0) if inside else 0

    def add_block(self, name, seed):
        known = [d for d in self.deltas if self.depth(d) < 3]
        outer = [d for d in known if d.name not in self.inside]
        children = self.some(known if self.random.random() < 0.2 else outer or known, 4)
        twice = [d for d in children if d.name in self.inside and d.config.delta_type == "prefix"]
        children = [d for d in children if d not in twice] or [self.deltas[0]]
        count = len(children)
        method = self.pick([AverageModel, GateModel, FuseModel])
        options = {
            AverageModel: {
                "weights": self.pick([None, [*map(float, self.random.normal(size=count))]]),
                "learn": self.pick([True, False]),
            },
            GateModel: {"top_k": self.pick([None, 1, 2]), "temperature": self.pick([1.0, 0.6])},
            FuseModel: {"value": self.pick([True, False])},
        }[method]
        if method is not AverageModel:
            options["exclude_modules"] = ["conv2d"]
        try:
            block = method(self.model, deltas=children, name=name, **options)
        except opendelta.AddressError:  # nothing but the convolution is left
            return
        self.deltas.append(shake(block, seed=seed, scale=0.4))
        self.inside |= {d.name for d in children}

    # -------------------------------------------------------------------------------- the verbs
    def descendants(self, delta, among):
        found = []
        for other in among:
            if other.name in delta.config.children and other not in found:
                found += [other, *self.descendants(other, among)]
        return found

    def order(self):
        return [d for name in composition(self.model).names for d in self.deltas if d.name == name]

    def step(self):
        attached = [d for d in self.deltas if d.attached]
        detached = [d for d in self.deltas if not d.attached]
        verb = self.pick(["switch", "detach", "attach", "attach", "reorder", "scale", "block"])
        if verb == "switch":
            self.pick(self.deltas).record.switch(bool(self.random.integers(2)))
        elif verb == "detach" and attached:
            self.pick(attached).detach()
        elif verb == "attach" and detached:
            beside = {} if not attached else self.pick([{}, {"before": self.pick(attached)}])
            self.pick(detached).attach(**beside)
        elif verb == "reorder" and attached:
            names = composition(self.model).names
            composition(self.model).reorder([*map(str, self.random.permutation(names))])
        elif verb == "scale":
            scaled = [d for d in self.deltas if all(ly.scales for ly in d.layers.values())]
            if scaled:
                self.pick(scaled).scale = self.pick([1.0, 0.5, -2.0, 0.0])
        elif verb == "block":
            block = self.pick([d for d in self.deltas if d.config.children] or self.deltas)
            active = bool(self.random.integers(2))
            block.enable() if active else block.disable()
            for each in [block, *self.descendants(block, self.deltas)]:
                assert each.active == active

    def acting(self):
        return [d for d in self.order() if d.active]

    def expected(self, acting):
        return Reference(self.plain, self.model, acting).output(IDS)

    def chosen(self):
        """Some names for `only`, and the deltas that act then."""
        attached = self.order()
        named = self.some(attached, 3) if attached else []
        acting = list(named)
        for delta in named:
            inside = [d for d in attached if d.name in delta.config.children]
            if not any(d in named for d in inside):
                acting += self.brought(delta, attached, named)
        return [d.name for d in named], [d for d in attached if d in acting]

    def brought(self, delta, attached, named):
        inside = [d for d in attached if d.name in delta.config.children]
        if any(d in named for d in inside):
            return []
        return inside + [e for d in inside for e in self.brought(d, attached, named)]

    def check(self):
        torch.testing.assert_close(self.model(IDS), self.expected(self.acting()))

    def check_all(self, folder):
        self.check()
        composed = composition(self.model)
        out = self.model(IDS)
        names, acting = self.chosen()
        with composed.only(*names):
            torch.testing.assert_close(self.model(IDS), self.expected(acting))
        parameters = [p for d in self.acting() for p in d.parameters()]
        seeds = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
        if parameters and out.requires_grad:
            grads = [
                torch.autograd.grad(y, parameters, seeds, allow_unused=True, materialize_grads=True)
                for y in (self.model(IDS), self.expected(self.acting()))
            ]
            for got, wanted in zip(*grads, strict=True):
                torch.testing.assert_close(got, wanted)
        with torch.no_grad(), composed.frozen():
            torch.testing.assert_close(self.model(IDS), out)
        assert torch.equal(copy.deepcopy(self.model)(IDS), out)
        for where in ("linear", "attention", "norm"):
            assert composed.explain(where).formula
        self.check_merging(composed, out)
        self.check_saving(composed, out, folder)
        assert torch.equal(self.model(IDS), out)

    def check_merging(self, composed, out):
        try:
            composed.merge()
        except opendelta.SiteError:
            return
        torch.testing.assert_close(self.model(IDS), out)
        composed.unmerge()
        assert torch.equal(self.model(IDS), out)

    def check_saving(self, composed, out, folder):
        attached = {d.name for d in self.order()}
        if any(not attached.issuperset(d.config.children) for d in self.order()):
            with pytest.raises(opendelta.DeltaError, match="is not attached"):
                composed.save(folder)
        elif attached:
            composed.save(folder)
            other = made()
            loaded = opendelta.load(folder, other)
            assert loaded.names == composed.names
            assert torch.equal(other(IDS), out)


@pytest.mark.filterwarnings("ignore::opendelta.SharedDeltaWarning")
@pytest.mark.parametrize("seed", range(12))
def test_random_deltas_in_random_blocks_compute_what_the_formulas_say(seed, tmp_path):
    world = World(seed)
    world.check_all(tmp_path / "start")
    for _ in range(6):
        world.step()
        world.check()
    world.check_all(tmp_path / "end")
    attached = world.order()
    for index in world.random.permutation(len(attached)):
        attached[index].detach()
        world.check()
    opendelta.assert_pristine(world.model, like=world.before)


@pytest.mark.filterwarnings("ignore::opendelta.SharedDeltaWarning")
@pytest.mark.parametrize("renewed", [torch.clone, lambda x: x.view_as(x)], ids=["copy", "view"])
@pytest.mark.parametrize("seed", range(12))
def test_hooks_that_give_layers_other_tensors_of_the_same_values_change_nothing(seed, renewed):
    """As those of FSDP2 do."""

    def renew(layer, args, kwargs):
        return pytree.tree_map_only(torch.Tensor, renewed, (args, kwargs))

    world = World(seed)
    layers = [layer for delta in world.deltas for layer in delta.layers.values()]
    hooks = [layer.register_forward_pre_hook(renew, with_kwargs=True) for layer in layers]
    world.check()
    for _ in range(4):
        world.step()
        world.check()
    for hook in hooks:
        hook.remove()
    world.check()
