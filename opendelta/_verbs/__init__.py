"""Functions on all deltas of a model at once: merge, copy, check, plan, assert_pristine.

It imports `_deltas` and `_show`; the rooms from `_checkpoint` on may import it. It knows no file.
"""
