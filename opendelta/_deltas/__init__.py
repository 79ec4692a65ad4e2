"""One delta: its options, its layers, its place in the order; attaching and detaching it.

The four steps of attaching are `choosing`, `making`, `placing`, `committing`. The room imports
`_backbone`; every room above but `_show` may import it.
"""
