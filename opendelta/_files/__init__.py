"""The format of a folder: JSON, safetensors, tensors compared before they are copied.

It knows no delta and no model. It imports `_modules`; every room above but `_layers` may import it.
"""
