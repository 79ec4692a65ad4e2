"""Random verbs on deltas of one model, and what a test knows of each delta without the library."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import opendelta
from opendelta import composition

from .nets import shake


class Known:
    """What the test knows of one delta: nothing of it comes from the library but its tensors."""

    def __init__(self, kind, handle, sites):
        self.kind, self.handle, self.sites = kind, handle, sites
        self.attached, self.enabled, self.scale = True, True, 1.0

    def tensors(self, site):
        return dict(self.handle.layers[site].named_parameters())


class Deltas(RuleBasedStateMachine):
    """The verbs: a subclass makes the model, and says what it must compute.

    Attributes:
        kinds: {kind: (method, its options, the modules, or pairs, that it may be put on)}.
        scaled: the kinds that have a scale.
        most: number of deltas that are made.
        order: what is known of each delta, in the composition's order.
        blocks: the open blocks: (block, {known: acts}, it chooses about all deltas).
    """

    most = 6

    def begin(self, model):
        """Begin with a model without deltas."""
        self.model, self.order, self.blocks, self.number = model, [], [], 0
        self.before = opendelta.snapshot(model)

    def acts(self, known, blocks):
        """True if a delta acts inside these blocks."""
        if not known.attached:
            return False
        for block in reversed(blocks):
            if known in block[1]:
                return block[1][known]
        return known.enabled

    # --------------------------------------------------------------------------------- the verbs
    def one(self, data, **wanted):
        those = [k for k in self.order if all(getattr(k, n) == v for n, v in wanted.items())]
        return data.draw(st.sampled_from(those)) if those else None

    @rule(data=st.data())
    def put(self, data):
        if len(self.order) >= self.most:
            return
        kind = data.draw(st.sampled_from(sorted(self.kinds)))
        method, options, places = self.kinds[kind]
        sites = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2, unique=True))
        self.number += 1
        names = [name for site in sites for name in ([site] if isinstance(site, str) else site)]
        handle = method(self.model, modified_modules=names, name=f"d{self.number}", **options)
        shake(handle, seed=self.number)
        self.order.append(Known(kind, handle, sites))
        self.joined(self.order[-1])

    def joined(self, known):
        for _, choice, alone in self.blocks:
            if alone:
                choice.setdefault(known, known.enabled)

    @rule(data=st.data())
    def take(self, data):
        if known := self.one(data, attached=True):
            known.handle.detach()
            known.attached = False

    @rule(data=st.data(), where=st.sampled_from(["old", "before", "after"]))
    def bring_back(self, data, where):
        known, other = self.one(data, attached=False), self.one(data, attached=True)
        if known is None:
            return
        beside = {} if where == "old" or other is None else {where: other.handle}
        known.handle.attach(**beside)
        known.attached = True
        if beside:
            self.order.remove(known)
            self.order.insert(self.order.index(other) + (where == "after"), known)
        self.joined(known)

    @rule(data=st.data())
    def reorder(self, data):
        attached = [known for known in self.order if known.attached]
        wanted = data.draw(st.permutations(attached))
        composition(self.model).reorder([known.handle for known in wanted])
        new = iter(wanted)
        self.order = [next(new) if known.attached else known for known in self.order]

    @rule(data=st.data(), active=st.booleans())
    def switch(self, data, active):
        if known := self.one(data, attached=True):
            known.handle.enable() if active else known.handle.disable()
            for block in reversed(self.blocks):
                if known in block[1]:
                    block[1][known] = active
                    return
            known.enabled = active

    @rule(data=st.data(), scale=st.sampled_from([0.0, 0.5, -2.0, 1.0]))
    def weigh(self, data, scale):
        known = self.one(data)
        if known is not None and known.kind in self.scaled:
            known.handle.scale = known.scale = scale

    @rule(data=st.data())
    def train(self, data):
        if known := self.one(data):
            self.number += 1
            shake(known.handle, seed=self.number)

    # -------------------------------------------------------------------------------- the blocks
    @rule(data=st.data(), alone=st.booleans())
    def open(self, data, alone):
        attached = [known for known in self.order if known.attached]
        if len(self.blocks) >= 3 or not attached:
            return
        if alone:
            chosen = data.draw(st.lists(st.sampled_from(attached), unique=True))
            block = composition(self.model).only(*[known.handle for known in chosen])
            choice = {known: known in chosen for known in attached}
        else:
            known = data.draw(st.sampled_from(attached))
            block, choice = known.handle.disabled(), {known: False}
        block.__enter__()
        self.blocks.append((block, choice, alone))

    @precondition(lambda self: getattr(self, "blocks", None))
    @rule(data=st.data())
    def close(self, data):
        """End an open block, whichever began last."""
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        block[0].__exit__(None, None, None)

    def teardown(self):
        for block, *_ in getattr(self, "blocks", ()):
            block.__exit__(None, None, None)
        for known in getattr(self, "order", ()):
            if known.attached:
                known.handle.detach()
        if hasattr(self, "model"):
            opendelta.assert_pristine(self.model, like=self.before)
