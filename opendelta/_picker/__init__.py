"""The page on which users pick modules and options: its server, its answers, its HTML.

It imports `_verbs`; `_handles` and the command `opendelta` may import it, where a page is opened.
"""
