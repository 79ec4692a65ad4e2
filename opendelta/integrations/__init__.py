"""Connect deltas to tools that train: transformers' Trainer and TRL.

Each module is imported by its name, such as `opendelta.integrations.trl`, since it may import the
tool. The room imports `_handles` and what is below; no room imports it.
"""
