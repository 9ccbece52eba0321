"""The one exception for mistakes that the user can mend; commands print it and exit with 2."""


class LordbaError(Exception):
    """Says which file, module or tensor is wrong, what was expected, what was found, and what to do."""
