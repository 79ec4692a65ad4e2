"""Facts about one plain torch module: its kind, its call, its tensors, its device.

It knows of deltas only the name of their slot. It imports only `errors` and `names`; every other
room may import it.
"""
