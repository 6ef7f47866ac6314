"""YAML as experiments and instances use it: duplicate keys and aliases refused, 1e-3 read as a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hpc.errors import UserError

_MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):  # an alias bomb of 306 bytes expands to 387 million leaves
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases are not read; share settings with 'base:'", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, bool) or not isinstance(key, str | int):
                hint = "; put quotes around yes, no, on and off" if isinstance(key, bool) else ""
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is no name for a key{hint}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # libyaml: 7 times as fast
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that stands twice is written twice: the loader reads no aliases

    def represent_str(self, text: str) -> Any:
        """Quoted with escapes where it holds a line break that YAML would read back as another."""
        style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

# YAML 1.1 reads 1e-3 as text; every learning rate is written so. The dumper must know: a name 1e3 needs quotes.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises UserError naming `origin`, the line and the fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: {problem}") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deep") from None
    except ValueError as error:  # of Python's own: the date 2024-13-45, a number of 5000 digits
        raise UserError(f"{origin}: {error}; put quotes around text") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing file, a fault, or anything but a mapping."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: larger than 1 MiB; an experiment is a small file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    value = parse(text, str(path))
    if value is None:
        raise UserError(f"{path}: is empty; write 'key: value' lines")
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not 'key: value' lines")
    return value


def dump(value: Any) -> str:
    """YAML text with the order of keys kept."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
