"""What one plain torch module is: its kind, its call, its tensors, where it computes.

It knows no delta. It imports only `errors` and `names`; every other room may import it.
"""
