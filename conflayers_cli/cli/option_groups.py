"""Options that go together: declared once as a group, taken by a command as one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

Result = TypeVar("Result")


class OptionGroup:
    """Options for the fields of a dataclass: ``load: Annotated[LoadOptions, LOAD]``.

    Args:
        options: `typer.Option` by field, in the order of the help; other fields keep their default.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def only(self, *names: str) -> OptionGroup:
        """The group with the options of these fields alone."""
        return OptionGroup(**{name: self.options[name] for name in names})

    def without(self, *names: str) -> OptionGroup:
        """The group without the options of these fields."""
        return self.only(*(name for name in self.options if name not in names))

    def but(self, **options: Any) -> OptionGroup:
        """The group with other options in the place of some fields' own."""
        return OptionGroup(**{**self.options, **options})


def with_groups(command: Callable[..., Result]) -> Callable[..., Result]:
    """Expand the groups among a command's parameters, so that Typer sees a parameter per option.

    A group's default, an instance of its dataclass, gives the options their defaults. When the
    command runs, it raises what the dataclass raises for the values given.
    """
    signature = inspect.signature(command, eval_str=True)
    expanded: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[Any, OptionGroup]] = {}
    for name, parameter in signature.parameters.items():
        group = _find_group(parameter.annotation)
        if group is None:
            expanded[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        kind = get_args(parameter.annotation)[0]
        default = kind() if parameter.default is parameter.empty else parameter.default
        groups[name] = default, group
        for each in _parameters(kind, default, group):
            if each.name in expanded:
                raise TypeError(f"{command.__name__}: {each.name} is declared twice")
            expanded[each.name] = each

    @wraps(command)
    def run(**values: Any) -> Result:
        for name, (default, group) in groups.items():
            fields = {field: values.pop(field) for field in group.options}
            values[name] = replace(default, **fields)
        return command(**values)

    vars(run)["__signature__"] = signature.replace(parameters=list(expanded.values()))
    run.__annotations__ = {name: each.annotation for name, each in expanded.items()}
    return run


def _find_group(annotation: Any) -> OptionGroup | None:
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, OptionGroup)), None)


def _parameters(kind: type, default: Any, group: OptionGroup) -> list[inspect.Parameter]:
    """A keyword parameter for each option of a group."""
    types = get_type_hints(kind)
    return [
        inspect.Parameter(
            field,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(default, field),
            annotation=Annotated[types[field], option],
        )
        for field, option in group.options.items()
    ]
