"""A site: one module that carries layers. Its class, the order of its calls, rows, merged weights.

It knows no backbone around the module. It imports `_layers`; every room above may import it.
"""
