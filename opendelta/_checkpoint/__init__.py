"""Save the deltas of a model into a folder or to the hub, and load them.

It imports `_deltas`, `_files`, `_show` and `interop`; the rooms from `_handles` on may import it.
"""
