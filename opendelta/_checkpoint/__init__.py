"""The deltas of a live model into a folder and back, and to the hub.

It imports `_deltas`, `_files`, `_show`, `_verbs` and `interop`; the rooms from `_handles` on may
import it.
"""
