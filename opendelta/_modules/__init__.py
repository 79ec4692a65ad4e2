"""Facts about one plain torch module: its kind, its call, its tensors, its device.

It knows no delta. It imports only `errors` and `names`; every other room may import it.
"""
