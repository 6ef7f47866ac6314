"""Mistakes of a user: one clear line that names the bad value, the good ones and the next command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad usage or bad input; the command prints the message alone and leaves with exit code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? ` where a valid name is close, then the list of all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6) or [n for n in names if n.startswith(name)][:2]
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"
