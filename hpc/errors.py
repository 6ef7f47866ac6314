"""Mistakes of a user: one clear line that names the bad value, the good ones and the next command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_WHOLE, _SHOWN = 30, 12
"""So many valid names are listed whole; of more the first ones."""


class UserError(Exception):
    """Bad usage or bad input; the command prints the message alone and leaves with exit code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean 'x'? ` where a valid name is close, then the valid names; of very many the first ones."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6) or [n for n in names if n.startswith(name)][:2]
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    if len(names) > _WHOLE:
        others = [name for name in names if name not in close]
        names = [*others[:_SHOWN], f"... and {len(others) - _SHOWN} more"]
    return f"{hint}valid: {', '.join(names)}"
