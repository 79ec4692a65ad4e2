"""A backbone: one model with sites. Its names, tensors, shapes and shards, and its modules' roles.

It knows layers and sites, and no delta as a whole. It imports `_sites`; every room above may import
it.
"""
