"""Show models and deltas as trees, tables and formulas, as text and in colours.

It changes nothing. It imports `_backbone`; every room above may import it.
"""
