"""Facts about the tokens of one call, and trials of what a model makes of its tokens.

Which are padding, where documents begin, how many came before. It knows of no delta. It imports
`_modules`; every room above may import it.
"""
