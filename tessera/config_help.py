"""What `--help` prints for a config: every dotted key with its type, default and documentation.

The documentation of a field is the string literal after it, which Python drops and `ast` finds again.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WIDTH = 100


def help_text(config_class: type, *, prog: str) -> str:
    """Describes a command whose settings are the fields of a dataclass.

    Args:
        config_class: the dataclass; sections are its nested dataclasses.
        prog: the command as the user types it.

    Returns:
        Text of several lines, without a final newline.
    """
    lines = [f"usage: {prog} [CONFIG.yaml ...] [key=value ...] [--print-config] [--help]", ""]
    summary = _class_summary(config_class)
    if summary:
        lines += [*textwrap.wrap(summary, width=WIDTH), ""]
    lines.append("Defaults come first, then each YAML file in order, then each key=value.")
    return "\n".join([*lines, *_describe(config_class, prefix="", default=None)])


def field_documentation(config_class: type) -> dict[str, str]:
    """The string literals that follow the fields of a dataclass, by field name, in one line each."""
    found: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError):  # no source at hand, e.g. a class made in a console
            continue
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
        for node, after in zip(body, body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.target.id] = " ".join(after.value.value.split())
    return found


def nested_class(field_type: Any) -> type | None:
    """The dataclass that a field holds, also when it may be None; None for any other type."""
    if isinstance(field_type, type) and dataclasses.is_dataclass(field_type):
        return field_type
    if get_origin(field_type) in (Union, types.UnionType):
        members = [nested_class(member) for member in get_args(field_type) if member is not type(None)]
        return members[0] if len(members) == 1 else None
    return None


def type_name(field_type: Any) -> str:
    """A type as a user writes its values: `gumbel | fsq`, `[int, ...]`, `text | null`."""
    origin, arguments = get_origin(field_type), get_args(field_type)
    if field_type is type(None):
        return "null"
    if field_type is str:
        return "text"
    if field_type is bool:
        return "true | false"
    if field_type is Path:
        return "path"
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(member) for member in arguments)
    if origin in (tuple, list):
        item_names = ["..." if item is Ellipsis else type_name(item) for item in arguments]
        return f"[{', '.join(item_names)}]" if origin is tuple else f"[{item_names[0]}, ...]"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}, ...}}"
    nested = nested_class(field_type)
    if nested is not None:
        return f"the keys {', '.join(field.name for field in dataclasses.fields(nested))}"
    return getattr(field_type, "__name__", str(field_type))


def _describe(config_class: type, *, prefix: str, default: Any) -> Iterator[str]:
    hints = get_type_hints(config_class)
    documentation = field_documentation(config_class)
    sections = []
    if not prefix:
        yield ""
    for field in dataclasses.fields(config_class):
        value = getattr(default, field.name) if default is not None else _field_default(field)
        nested = nested_class(hints[field.name])
        if nested is not None:
            sections.append((field.name, nested, value))
            continue
        shown = "(required)" if value is dataclasses.MISSING else f"= {_show(value)}"
        yield f"  {prefix}{field.name}: {type_name(hints[field.name])} {shown}"
        text = documentation.get(field.name)
        if text:
            yield from textwrap.wrap(text, width=WIDTH, initial_indent="      ", subsequent_indent="      ")
    for name, nested, value in sections:
        yield ""
        summary = documentation.get(name) or _class_summary(nested)
        yield from textwrap.wrap(f"{prefix}{name}: {summary}".rstrip(": "), width=WIDTH)
        instance = None if value is dataclasses.MISSING else value
        yield from _describe(nested, prefix=f"{prefix}{name}.", default=instance)


def _field_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING if field.default == "???" else field.default


def _class_summary(config_class: type) -> str:
    """The first paragraph of the docstring; dataclasses without one carry their signature, which is no summary."""
    text = inspect.cleandoc(config_class.__doc__ or "")
    if text.startswith(f"{config_class.__name__}("):
        return ""
    return " ".join(text.split("\n\n")[0].split())


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_show(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_show(item)}' for key, item in value.items())}}}"
    return str(value) if value != "" else '""'
