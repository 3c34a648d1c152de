"""Command-line options made from the fields of pydantic models, and tables of those fields.

A field says once what an option is called, its type, default, bounds and meaning; no command says it again. Models are
read when their command is chosen: ``sentcompress --help`` does without pydantic.

::

    @model_options(lambda: DEFAULT_SETTINGS)
    def generate(folder: Path, **settings: Any) -> None: ...

    @recipe_options(device="bench.device")
    def speed(folder: Path, set_: SetOption = None) -> None: ...

    app.command(cls=FieldCommand)(generate)
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from sentcompress.cli.common import user_path

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Command = Callable[..., None]


class FieldCommand(TyperCommand):
    """A command that also has the options of :func:`model_options` or :func:`recipe_options`."""

    def get_params(self, ctx: Any) -> list[Any]:
        options: list[Any] = self.callback.__dict__.setdefault("options", [])
        if not options:
            options += _click_options(self.callback.__dict__["make_options"]())
        known = super().get_params(ctx)
        arguments = [p for p in known if p.param_type_name == "argument"]
        return [*arguments, *options, *known[len(arguments) :]]

    def invoke(self, ctx: Any) -> Any:
        # typer's own callback may refuse parameters that are not in the function's signature.
        make_callback: Any = typer.main.get_callback
        callback: Any = self.callback
        if "convertors" not in inspect.signature(make_callback).parameters:
            params = [p for p in self.get_params(ctx) if p.expose_value]  # not --help
            self.callback = make_callback(
                callback=callback.__wrapped__, params=params, pretty_exceptions_short=False
            )
        try:
            return super().invoke(ctx)
        finally:
            self.callback = callback


def model_options(defaults: Callable[[], BaseModel]) -> Callable[[Command], Command]:
    """Give a command that takes ``**settings`` an option for each field of a model.

    Left out are fields with ``json_schema_extra={"option": False}``.

    Args:
        defaults: returns an instance of the model; its values are the options' defaults.
    """

    def make_options() -> list[inspect.Parameter]:
        instance = defaults()
        own = inspect.get_annotations(type(instance))  # inherited fields come after these
        fields = sorted(type(instance).model_fields.items(), key=lambda field: field[0] not in own)
        return [
            _option(name, info, getattr(instance, name))
            for name, info in fields
            if not isinstance(info.json_schema_extra, dict) or info.json_schema_extra.get("option", True)
        ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__dict__["__signature__"] = signature.replace(parameters=named)
        command.__dict__["make_options"] = make_options
        return command

    return decorate


def recipe_options(**paths: str) -> Callable[[Command], Command]:
    """Give a command options that set fields of its recipe, before those of its ``--set``.

    Args:
        **paths: the field of each option, such as ``device="bench.device"``. Without the option the recipe's value
            stays. A list is given with commas between its values. A field with ``json_schema_extra={"path": True}``
            takes a path, so that ``out/vae/`` is recorded as ``out/vae``.
    """

    def make_options() -> list[inspect.Parameter]:
        return [_option(name, recipe_field(path), None, path) for name, path in paths.items()]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(set_: list[str] | None = None, **values: Any) -> None:
            chosen = {path: values.pop(name) for name, path in paths.items() if name in values}
            overrides = [_recipe_override(path, value) for path, value in chosen.items() if value is not None]
            command(set_=[*overrides, *(set_ or [])], **values)

        run.__dict__["make_options"] = make_options
        return run

    return decorate


def override(path: str, value: Any) -> str:
    """A ``--set`` that gives a recipe's field a value: JSON is YAML, so that any value survives."""
    return f"{path}={json.dumps(value, ensure_ascii=False)}"


def _recipe_override(path: str, value: Any) -> str:
    if is_list(recipe_field(path)):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return override(path, str(value) if isinstance(value, Path) else value)


def recipe_field(path: str) -> FieldInfo:
    """The field of a recipe at a path such as ``bench.device``."""
    from sentcompress.recipe import Recipe

    model: Any = Recipe
    *sections, name = path.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        model = next(a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields"))
    field: FieldInfo = model.model_fields[name]
    return field


def is_list(info: FieldInfo) -> bool:
    """Whether a field holds several values, which the command line takes as one text."""
    return any(get_origin(a) in (list, tuple) for a in (info.annotation, *get_args(info.annotation)))


def _option(name: str, info: FieldInfo, default: Any, recipe_path: str | None = None) -> inspect.Parameter:
    """The parameter of a command function for a field: its annotation is what typer reads."""
    text = plain(info.description or "").replace("`", "")
    limits = ", ".join(_limits(info))
    kind: Any = info.annotation
    metavar = None
    if is_list(info):
        kind, metavar, limits = str, "NAMES", f"comma-separated: {_annotation(get_args(kind)[0])}"
    if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("path"):
        kind = Path
    if recipe_path is not None:
        kind = Union[kind, None]  # noqa: UP007 - made while running
    settings = typer.Option(
        f"--{'no-' if default is True else ''}{name.replace('_', '-')}",
        help=f"{text} [{limits}]" if limits else text,
        metavar=metavar,
        parser=user_path if kind == Path | None else None,
        show_default=f"the recipe's {recipe_path}" if recipe_path else True,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, settings]
    )


def _click_options(parameters: list[inspect.Parameter]) -> list[Any]:
    """The options that typer makes of a function with these parameters."""

    def function(**_: Any) -> None: ...

    function.__dict__["__signature__"] = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    return list(typer.main.get_command(app).params)


# ---- tables of fields, for ``plugins show`` and docs/recipes.md


class FieldRow(NamedTuple):
    """One line of a table of options."""

    name: str
    type: str
    default: str
    description: str


def describe_fields(model: type[BaseModel]) -> list[FieldRow]:
    """One row per field, in the order of the class."""
    return [
        FieldRow(name, type_text(info), default_text(info), plain(info.description or ""))
        for name, info in model.model_fields.items()
    ]


def type_text(info: FieldInfo) -> str:
    """The type and its limits, such as ``int, >= 1 | null``."""
    return ", ".join([_annotation(info.annotation), *_limits(info)])


def _limits(info: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(limit, name)}"
        for limit in info.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(limit, name, None) is not None
    ]


def default_text(info: FieldInfo) -> str:
    """The default as YAML would have it; ``required`` without one."""
    if info.is_required():
        return "required"
    from pydantic import BaseModel

    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(changed) if changed else "defaults"
    if isinstance(value, tuple | set | frozenset):
        value = list(value)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def plain(docstring: str) -> str:
    """A docstring on one line, with Markdown's single backticks."""
    return re.sub(r"\s+", " ", docstring).replace("``", "`").strip()


def _annotation(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_annotation(a) for a in arguments)
    if origin is not None and arguments:
        if origin.__name__ == "Annotated":
            return _annotation(arguments[0])
        return f"{origin.__name__}[{', '.join(_annotation(a) for a in arguments if a is not Ellipsis)}]"
    return getattr(annotation, "__name__", str(annotation))
