"""The computation of one delta layer, and the base classes that authors subclass.

It knows no backbone and no file; a prefix and a labels layer find the other layers of their module
in its slot. It imports `_modules`; every room above may import it.
"""
