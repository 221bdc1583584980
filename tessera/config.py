"""From defaults, YAML files and key=value overrides to a frozen dataclass, through OmegaConf structured configs.

A config is a frozen keyword-only dataclass that stands directly above the class that it configures; the string literal
after a field is its documentation. OmegaConf checks and converts the values; no type of its own leaves this file.
"""

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tessera.config_help import help_text, nested_class, type_name
from tessera.errors import UserError
from tessera.plain_yaml import dump_yaml, parse_yaml, read_yaml, write_yaml

__all__ = ["from_plain", "load", "read_yaml", "to_plain", "write_yaml"]

ConfigT = TypeVar("ConfigT")

_OVERRIDE = re.compile(r"-{0,2}[A-Za-z_][\w.\-]*=", re.ASCII)
_RESOLVER = re.compile(r"\$\{[^{}]*:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    key: str  # dotted
    value: Any
    source: str  # the file or the override that it came from

    @property
    def place(self) -> str:
        """Where the user finds it; an override says its key itself."""
        return self.source if self.source.startswith(f"{self.key}=") else f"{self.source}: {self.key}"


def load(config_class: type[ConfigT], argv: Sequence[str], *, prog: str) -> ConfigT:
    """Builds a config from the command line: defaults, then each YAML file in order, then each key=value.

    `--help` prints every key with its type, default and documentation, `--print-config` the resolved YAML; both end the
    program. Overrides of text fields are taken as they are; others are read as YAML (`layers=[1,2]`, `limit=null`).

    Args:
        config_class: a frozen dataclass; its fields may be dataclasses themselves.
        argv: YAML files and overrides in any order, e.g. `["configs/dvae/scenes.yaml", "optim.lr=1e-4"]`.
        prog: the command as the user types it, for `--help`.

    Returns:
        An instance of `config_class` that holds plain Python values only.

    Raises:
        UserError: naming the file or override and the key.
        SystemExit: with code 0 after `--help` and `--print-config`.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(config_class, prog=prog))
        raise SystemExit(0)
    files: list[str] = []
    overrides: list[str] = []
    print_config = False
    for argument in argv:
        if argument == "--print-config":
            print_config = True
        elif _OVERRIDE.match(argument):
            if argument.startswith("-"):
                raise UserError(f"{argument}: settings have no dashes, write {argument.lstrip('-')}")
            overrides.append(argument)
        elif argument.endswith((".yaml", ".yml")):
            files.append(argument)
        else:
            raise UserError(f"{argument!r} is neither a YAML file nor key=value; see `{prog} --help`")

    settings = [setting for file in files for setting in _settings(config_class, read_yaml(file), source=file)]
    settings += [_parse_override(config_class, override) for override in overrides]
    config = _build(config_class, settings, source=prog, interpolation=True)
    if print_config:
        print(dump_yaml(to_plain(config)), end="")
        raise SystemExit(0)
    return config


def from_plain(config_class: type[ConfigT], mapping: Mapping[str, Any], *, source: str) -> ConfigT:
    """Builds a config from a mapping that may come from a stranger, such as a model folder's `config.yaml`.

    Nothing is resolved: a value that holds `${` is refused, so that no file can read the environment.

    Args:
        config_class: a frozen dataclass.
        mapping: nested plain values; absent keys take their defaults.
        source: named in errors, e.g. the path of the file.

    Returns:
        An instance of `config_class`.

    Raises:
        UserError: for unknown keys, wrong types, missing keys, and `${`.
    """
    return _build(
        config_class, list(_settings(config_class, mapping, source=source)), source=source, interpolation=False
    )


def to_plain(config: Any) -> Any:
    """Turns a config into dicts, lists, strings, numbers, booleans and None: what YAML and JSON hold.

    Raises:
        TypeError: for a value of any other kind.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_plain(value) for value in config]
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if config is None or isinstance(config, bool):
        return config
    for plain in (str, int, float):
        if isinstance(config, plain):
            return plain(config)  # subclasses too, e.g. numpy.float64
    raise TypeError(f"a config holds plain values only, got {type(config).__name__}: {config!r}")


def _settings(config_class: type, mapping: Mapping[Any, Any], *, source: str, prefix: str = "") -> Iterator[_Setting]:
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        field_type = _field_type(config_class, key, source=source)
        if nested_class(field_type) and isinstance(value, Mapping):
            yield from _settings(config_class, value, source=source, prefix=f"{key}.")
        elif not (value is None and nested_class(field_type) is field_type):  # a section with no lines in it
            yield _Setting(key=key, value=value, source=source)


def _parse_override(config_class: type, override: str) -> _Setting:
    key, text = override.split("=", 1)
    field_type = _field_type(config_class, key, source=override)
    if _is_text(field_type) and not (text == "null" and type(None) in get_args(field_type)):
        return _Setting(key=key, value=text, source=override)  # verbatim: a caption may look like YAML
    try:
        return _Setting(key=key, value=parse_yaml(text), source=override)
    except UserError as error:
        raise UserError(f"{override}: expected {type_name(field_type)} ({error})") from error


def _build(config_class: type[ConfigT], settings: Sequence[_Setting], *, source: str, interpolation: bool) -> ConfigT:
    node: Any = OmegaConf.structured(config_class)
    for setting in settings:
        _check_strings(setting, interpolation=interpolation)
    try:
        node = OmegaConf.merge(node, *map(_nested, settings))  # which copies the node once for all of them
    except OmegaConfBaseException:
        _name_the_wrong_one(config_class, node, settings)
        raise
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise UserError(f"{source}: {missing[0]} has no default, give it: {missing[0]}=...")
        config = OmegaConf.to_object(node)
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, config_class)
    return config


def _nested(setting: _Setting) -> Any:
    nested: Any = setting.value
    for name in reversed(setting.key.split(".")):
        nested = {name: nested}
    return nested


def _name_the_wrong_one(config_class: type, node: Any, settings: Sequence[_Setting]) -> None:
    """Merges one at a time, because not every error of OmegaConf's names its key."""
    for setting in settings:
        try:
            node = OmegaConf.merge(node, _nested(setting))
        except OmegaConfBaseException as error:
            expected = type_name(_field_type(config_class, setting.key, source=setting.source))
            raise UserError(f"{setting.place}: expected {expected}, got {_show(setting.value)}") from error


def _field_type(config_class: type, key: str, *, source: str) -> Any:
    """The declared type of a dotted key; Any below a mapping field."""
    current: Any = config_class
    names = key.split(".")
    for depth, name in enumerate(names):
        owner = nested_class(current)
        if owner is None:
            if get_origin(current) is dict:
                return get_args(current)[1]
            raise UserError(f"{source}: {'.'.join(names[:depth])} is {type_name(current)} and has no key {name!r}")
        hints = get_type_hints(owner)
        if name not in {field.name for field in dataclasses.fields(owner)}:
            raise UserError(f"{source}: unknown key {key!r}, {_suggestion(config_class, names[:depth], name)}")
        current = hints[name]
    return current


def _suggestion(config_class: type, section: list[str], name: str) -> str:
    prefix = "".join(f"{part}." for part in section)
    keys = {key: key.split(".")[-1] for key in _all_keys(config_class)}
    siblings = {key: last for key, last in keys.items() if key == f"{prefix}{last}"}
    for candidates, cutoff in ((siblings, 0.6), (keys, 0.85)):
        close = difflib.get_close_matches(name, candidates.values(), n=1, cutoff=cutoff)
        if close:
            return f"did you mean {next(key for key, last in candidates.items() if last == close[0])!r}?"
    return f"expected one of {', '.join(siblings)}"


def _all_keys(config_class: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield f"{prefix}{field.name}"
        nested = nested_class(hints[field.name])
        if nested is not None:
            yield from _all_keys(nested, prefix=f"{prefix}{field.name}.")


def _is_text(field_type: Any) -> bool:
    if get_origin(field_type) is Literal:
        return all(isinstance(choice, str) for choice in get_args(field_type))
    if get_origin(field_type) in (Union, types.UnionType):
        return all(member is type(None) or _is_text(member) for member in get_args(field_type))
    return field_type in (str, Path)


def _check_strings(setting: _Setting, *, interpolation: bool) -> None:
    for text in _strings(setting.value):
        if "${" in text and not interpolation:
            raise UserError(f"{setting.place}: ${{...}} is not allowed here, write the value itself")
        if _RESOLVER.search(text):
            raise UserError(f"{setting.place}: ${{...}} can name another key and nothing else, got {text!r}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
