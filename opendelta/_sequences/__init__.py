"""Layers that work along the axis of the tokens: prompts, prefixes, chosen tokens, gates of texts.

They need to know where the documents of a row begin, and give their model what it lacks for that.
It imports `_layers` and `_texts`; every room above may import it.
"""
