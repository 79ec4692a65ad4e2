"""One model with sites: names, tensors, shapes, shards, and the roles of its modules.

It knows layers and sites, and no delta as a whole. It imports `_sites`; every room above may import
it.
"""
