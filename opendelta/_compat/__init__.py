"""The module paths of OpenDelta 0.3, such as `opendelta.delta_models.lora`.

The package's path has this folder, so that Python finds `opendelta.auto_delta` here. A file is
loaded only when a program imports it. Files here import from `opendelta` by full names, as they
have other names than their places say. Nothing imports this room; to delete it deletes the paths.
"""
