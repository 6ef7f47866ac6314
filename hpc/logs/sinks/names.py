"""Names of metrics as MLflow takes them, and back: what it refuses becomes _xHH_ (hexadecimal), as in spreadsheets.

IoU@0.5 -> IoU_x40_0.5. MLflow 3.17 takes letters, digits and `_ - . / : blank`, paths that are normal (no //,
no leading or trailing /, no . or .. as a part, no .. at the beginning), and 250 characters; a longer name ends in a
hash, and a tag keeps it whole.
"""

from __future__ import annotations

import hashlib
import re

LONGEST = 250
_HASH = 16
_ALLOWED = re.compile(r"[\w\-./: ]")
_EMPTY = "_xH_"
_ESCAPE = re.compile(r"_x([0-9A-F]+)_")
_LONG = re.compile(r"_xH([0-9a-f]{16})_$")


def encode(name: str) -> str:
    """The name that the server is told; the same for the same name, another for another. At most LONGEST long."""
    text = re.sub(r"_(?=x[0-9A-FH])", "_x5F_", name)
    text = "".join(char if _ALLOWED.match(char) else _escaped(char) for char in text)
    text = "/".join(_part(part) for part in text.split("/")) if text else _EMPTY
    text = re.sub(r"(?:^/+|/+$|/(?=/))", lambda found: _escaped("/") * len(found[0]), text)
    if text.startswith(".."):
        text = _escaped(".") + text[1:]
    if len(text) <= LONGEST:
        return text
    tail = f"_xH{fingerprint(name)}_"
    return text[: LONGEST - len(tail)].rstrip("/") + tail


def decode(name: str, whole: dict[str, str]) -> str:
    """The name that was logged. `whole`: of names that were cut, by their fingerprint."""
    if (cut := _LONG.search(name)) and cut[1] in whole:
        return whole[cut[1]]
    return "" if name == _EMPTY else _ESCAPE.sub(lambda found: chr(int(found[1], 16)), name)


def cut(name: str) -> bool:
    """Whether this encoded name was cut, so that its whole has to be kept beside it."""
    return bool(_LONG.search(name))


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_HASH]


def _part(part: str) -> str:
    """. and .. are no names of a part of a path."""
    return _escaped(".") * len(part) if part in (".", "..") else part


def _escaped(char: str) -> str:
    return f"_x{ord(char):X}_"
