"""Plain YAML in and out: maps, lists, text, numbers, booleans and null; no tags, aliases, dates or octal surprises.

The scalars are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema), so `no` and `0012` are
text and `1e-4` is a number, unlike in YAML 1.1. Aliases are refused because a short file can expand to gigabytes.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tessera.atomic_write import atomic_write
from tessera.errors import UserError

MAX_YAML_BYTES = 8 * 2**20

_SCALARS = {  # tag -> (pattern, the characters that it can begin with)
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def parse_yaml(text: str) -> Any:
    """Reads one YAML document.

    Raises:
        UserError: for anything that is not plain YAML, with the line.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
        raise UserError(f"{place}not plain YAML: {problem}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not plain YAML: {error}") from error


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """Writes plain values as YAML that `parse_yaml` reads back unchanged, in the mapping's own order."""
    return yaml.dump(mapping, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=10**6)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping; an empty file is an empty mapping.

    Raises:
        UserError: if the file is missing, too large, or not plain YAML with a mapping at the top.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"{path}: larger than {MAX_YAML_BYTES // 2**20} MiB, too large for a YAML file of ours")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, got a {type(content).__name__}")
    return content


def write_yaml(path: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Writes a mapping of plain values as YAML, atomically; the folder must exist."""
    with atomic_write(path) as temporary:
        temporary.write_text(dump_yaml(mapping), encoding="utf-8")


class _PlainLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_plain_map(self, node: yaml.MappingNode) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


class _PlainDumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_plain_text(self, data: str) -> yaml.Node:
        # Unquoted, the line breaks of Unicode (U+0085, U+2028) would come back as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    def represent_plain_sequence(self, data: Any) -> yaml.Node:
        flow = not any(isinstance(item, (dict, list, tuple)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_PlainLoader, _PlainDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)

_PlainLoader.add_constructor("tag:yaml.org,2002:map", _PlainLoader.construct_plain_map)
_PlainLoader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_PlainLoader.add_constructor("tag:yaml.org,2002:str", yaml.SafeLoader.construct_yaml_str)
_PlainLoader.add_constructor("tag:yaml.org,2002:null", yaml.SafeLoader.construct_yaml_null)
_PlainLoader.add_constructor("tag:yaml.org,2002:bool", yaml.SafeLoader.construct_yaml_bool)
_PlainLoader.add_constructor("tag:yaml.org,2002:int", yaml.SafeLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", yaml.SafeLoader.construct_yaml_float)
_PlainLoader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined  # every other tag is refused
_PlainDumper.add_representer(str, _PlainDumper.represent_plain_text)
_PlainDumper.add_representer(list, _PlainDumper.represent_plain_sequence)
_PlainDumper.add_representer(tuple, _PlainDumper.represent_plain_sequence)
