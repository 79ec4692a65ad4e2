"""The computation of one delta layer, and the base classes that authors subclass.

It knows no site, no backbone and no file. It imports `_modules`; every room above may import it.
"""
