"""Replace the part of a page that a tool writes, between two marks."""


def replaced(text: str, name: str, part: str) -> str:
    """The page with `part` between its marks `<!-- name: start -->` and `<!-- name: end -->`."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->\n"
    before, rest = text.split(start)
    return before + start + part + end + rest.split(end)[1]
