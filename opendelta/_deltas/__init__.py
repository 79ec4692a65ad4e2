"""One delta: its options, its layers, its place in the order, on and off its model.

The four steps of attaching are `choosing`, `making`, `placing`, `committing`. It imports
`_backbone`; every room above but `_show` may import it.
"""
