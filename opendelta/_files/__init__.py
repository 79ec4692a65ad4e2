"""Read and write the files of a folder: JSON and safetensors; compare tensors, then copy them.

It knows no delta and no model. It imports `_modules`; every room above but `_layers` may import it.
"""
