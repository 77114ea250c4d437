"""Command lines made from settings: each field is an option with its meaning, default and range."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from textwrap import indent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from pipeline.settings import plain_yaml

Model = TypeVar("Model", bound=BaseModel)
BOUNDS = {
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lt": "<",
    "multiple_of": "multiple of",
    "min_length": "at least",
    "max_length": "at most",
}


@contextmanager
def user_errors() -> Iterator[None]:
    """Show what the user can repair as a plain message and exit with status 2; Ctrl-C ends with one line as well."""
    try:
        yield
    except ValidationError as error:
        sys.exit(_fail("\n".join(_describe(problem) for problem in error.errors())))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:  # the latter from disks, networks and servers
        sys.exit(_fail("\n".join([str(error), *getattr(error, "__notes__", [])])))


def parse_settings(model: type[Model], argv: list[str] | None = None, *, description: str) -> Model:
    """Build ``model`` from options named after its fields; exits with a message when they don't fit."""
    parser = argument_parser(description)
    add_options(parser, model)
    options = vars(parser.parse_args(normalise(argv)))
    with user_errors():
        return model.model_validate(nest(options))


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser that prints its options as they are written and takes no abbreviations.

    Args:
        description: what the command does; the lines below its first paragraph are examples to paste.
    """
    summary, _, examples = description.partition("\n\n")
    return argparse.ArgumentParser(
        description=summary,
        epilog=examples and f"examples:\n{indent(examples.rstrip(), '  ')}",
        usage="%(prog)s [options]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel], prefix: str = "") -> None:
    """Add an option for each field of ``model``; fields that are settings themselves become groups.

    Values stay the text that was typed, for pydantic to parse by the field's type; but ``null`` is ``None`` where the
    field may be ``None``, and of a tuple a single word in brackets is a list in YAML.
    """
    group = parser.add_argument_group(prefix.rstrip("."), _summary(model)) if prefix else parser
    for name, field in model.model_fields.items():
        if _is_model(field.annotation):
            add_options(parser, field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            types = list(_alternatives(field.annotation))
            is_tuple = any(get_origin(each) is tuple for each in types)
            several: dict[str, Any] = {"nargs": "+", "action": _Several} if is_tuple else {}
            dest = prefix + (field.alias or name)
            group.add_argument(
                f"--{dest}".replace("_", "-"),
                dest=dest,
                type=_text_or_none if NoneType in types else str,
                metavar=_type_name(field.annotation),
                help=_help(field),
                **several,
            )


def normalise(argv: list[str] | None) -> list[str]:
    """The arguments with ``_`` in option names turned into ``-``, so that both spellings work."""
    arguments = sys.argv[1:] if argv is None else argv
    return [_normalise_option(argument) for argument in arguments]


def nest(options: dict[str, Any]) -> dict[str, Any]:
    """``{"train.steps": 5}`` as ``{"train": {"steps": 5}}``."""
    tree: dict[str, Any] = {}
    for dotted, value in options.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


class _Several(argparse.Action):
    """An option of several values, written ``a b`` or, as in a settings file, ``[a, b]``; ``null`` alone is none."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keep the values as one list, or ``null`` alone as ``None``."""
        setattr(namespace, self.dest, None if values == [None] else _parse_list(values))


def _normalise_option(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _text_or_none(text: str) -> str | None:
    return None if text == "null" else text


def _parse_list(words: list[str | None]) -> list[Any]:
    """The words themselves, or the list that a single one in brackets is."""
    if len(words) == 1 and str(words[0]).startswith("["):
        with suppress(ValueError):
            found = plain_yaml.load(str(words[0]))
            return found if isinstance(found, list) else words
    return words


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _describe(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "settings"
    reason = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r})"
    return f"{field}: {reason}{given}"


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types that a value may be of: those of a union, without the rules that belong to them."""
    if get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from _alternatives(each)
    else:
        yield annotation


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n")[0]


def _help(field: FieldInfo) -> str:
    notes = [f"{BOUNDS[key]} {getattr(rule, key)}" for rule in field.metadata for key in BOUNDS if hasattr(rule, key)]
    default = field.get_default(call_default_factory=True)
    notes.append("required" if default is PydanticUndefined else f"default {_show(default)}")
    return f"{field.description} [{', '.join(notes)}]".replace("%", "%%")


def _show(value: Any) -> str:
    return str(yaml.safe_dump(to_jsonable_python(value), default_flow_style=True).strip().removesuffix("...").strip())


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(annotation)) + "}"
    inner = [argument for argument in get_args(annotation) if argument not in (type(None), Ellipsis)]
    if get_origin(annotation) in (tuple, list):
        return f"[{_type_name(inner[0])},...]"
    if inner:
        return "|".join(_type_name(argument) for argument in inner)
    return str(getattr(annotation, "__name__", annotation)).upper()
