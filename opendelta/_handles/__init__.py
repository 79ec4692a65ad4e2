"""The classes and functions for users: `Delta`, `Composition`, `load`, `route`, `AutoDeltaModel`.

It imports every room below; `author`, `methods`, `recipes` and the programs may import it.
"""
