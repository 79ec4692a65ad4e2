"""What one does with all deltas of a model at once: merge, copy, check, plan, leave no trace.

It imports `_deltas` and `_show`; the rooms from `_checkpoint` on may import it. It knows no file.
"""
