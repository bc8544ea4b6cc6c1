"""One flat frozen dataclass -> click options + recipe file.

Every command's settings are one dataclass whose fields are made with `option(default, "help")`. A value comes from the
dataclass, from `--recipe FILE.yaml`, or from a flag; a recipe overrides the dataclass, and a flag overrides both. A
recipe key that is no field is refused with the nearest name.
"""

import dataclasses
import difflib
import functools
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from data.errors import RunError, UserError
from data.files import full_disk, reason_of
from data.options import argument, base_type, coerce, flag_of, option
from data.processes import end_with_the_command_above

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "launch/recipes"
RECIPE_HELP = (
    "YAML file of values, or the name of one in launch/recipes; flags win over it. Repeatable, the later one wins: "
    "--recipe demo --recipe dapo."
)
OTHER = "Other options"
"""Heading of the options without a section, in a command whose other options have one."""
__all__ = ["argument", "command", "option", "read_recipe", "resolve"]


def end_now(exit_code: int) -> None:
    """End the process at once: other processes are gone or stuck, so groups and engines cannot be taken down in order."""
    os._exit(exit_code)


def command(
    config_class: type, default_recipe: Callable[[dict[str, Any]], Path | None] = lambda given: None
) -> Callable[[Callable[[Any], None]], click.Command]:
    """Make a click command of `fn(config)`: one flag per field, `--recipe`, and one-sentence errors with exit code 2.

    default_recipe: gives the recipe to use when none is named, from the flags that were given.
    """

    def decorate(fn: Callable[[Any], None]) -> click.Command:
        @functools.wraps(fn)
        def run(recipe: tuple[str, ...], **flags: Any) -> None:
            fn(settings(click.get_current_context(), recipe, flags))

        def settings(context: click.Context, recipe: tuple[str, ...], flags: dict[str, Any]) -> Any:
            default = click.core.ParameterSource.DEFAULT
            given = {n: v for n, v in flags.items() if context.get_parameter_source(n) is not default}
            return resolve(config_class, recipe or [path for path in [default_recipe(given)] if path], given)

        def read(words: Sequence[str]) -> Any:
            with made.make_context(fn.__name__, list(words)) as context:
                return settings(context, context.params.pop("recipe"), context.params)

        fields = _in_order_of_help(config_class)
        for field in reversed(fields):  # click puts the option that is added last first
            run = _click_option(config_class, field)(run)
        run = click.option("--recipe", type=click.Path(), multiple=True, help=RECIPE_HELP)(run)
        made = Command(name=fn.__name__, callback=run, params=run.__click_params__[::-1], help=fn.__doc__)
        made.section_of = {field.name: field.metadata["section"] for field in fields}
        made.read = read
        return made

    return decorate


def _in_order_of_help(config_class: type) -> list[dataclasses.Field]:
    """The fields of the class itself, then those of each class above it: what a command is about comes first in --help."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    names = [name for above in config_class.__mro__ for name in above.__dict__.get("__annotations__", {})]
    return [fields[name] for name in dict.fromkeys(names) if name in fields]


class Command(click.Command):
    """A command that reports a UserError as the user's mistake: one sentence on stderr, exit code 2, no traceback."""

    section_of: dict[str, str] = {}
    """{name of a parameter: heading of --help under which it is listed}; "" or absent: under the last heading."""
    read: Callable[[Sequence[str]], Any]
    """The config of a command line, without running the command. Raises click.ClickException or UserError."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of --help under the headings of their sections, in the order in which the sections begin."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(ctx)
            if record is not None:  # None: a hidden option
                sections.setdefault(self.section_of.get(parameter.name, ""), []).append(record)
        others = sections.pop("", [])
        for title, records in [*sections.items(), (OTHER if sections else "Options", others)]:
            with formatter.section(title):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        end_with_the_command_above()
        try:
            return super().invoke(ctx)
        except RunError as error:
            click.ClickException(str(error)).show()
            sys.stdout.flush()
            end_now(1)
        except OSError as error:
            if not (sentence := full_disk(error)):
                raise
            raise _InputError(sentence) from error
        except FloatingPointError as error:
            # not the user's mistake: exit code 1; the message names sample and bundle
            raise click.ClickException(str(error)) from error
        except UserError as error:
            raise _InputError(str(error)) from error


class _InputError(click.ClickException):
    """Printed as `Error: sentence`."""

    exit_code = 2


def resolve(config_class: type, recipes: Sequence[str | Path], given: dict[str, Any]) -> Any:
    """The config from defaults < preset < recipes, the later ones last < given flags.

    Raises click.UsageError for a bad recipe or a missing value.

    A preset is the set of values that `config_class.presets(name)` gives for the value of the setting `preset`.
    """
    values: dict[str, Any] = {}
    for recipe in recipes:
        values |= read_recipe(config_class, recipe)
    values |= given
    if "preset" in values:
        values = {**config_class.presets(values["preset"]), **values}
    for field in dataclasses.fields(config_class):
        if field.name in values:
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise click.UsageError(f"Missing option '{flag_of(field.name)}'.")
    return config_class(**values)


def read_recipe(config_class: type, path: str | Path) -> dict[str, Any]:
    """The values of a recipe, checked against the dataclass: unknown keys and wrong types are refused by name.

    path: a file, or the name of one of launch/recipes/, such as demo.
    """
    shipped = RECIPES / f"{path}.yaml"
    path = shipped if shipped.is_file() and not Path(path).is_file() else path
    if not Path(path).is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise click.UsageError(f"--recipe {path}: no such file, and not one of {names}")
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (
        yaml.YAMLError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # what it raises for odd dates and numbers
        raise click.UsageError(f"--recipe {path}: not valid YAML ({' '.join(str(error).split())[:400]})") from None
    except OSError as error:
        raise click.UsageError(f"--recipe {path}: cannot be read ({reason_of(error)})") from None
    if not isinstance(raw, dict):
        raise click.UsageError(f"--recipe {path}: must be 'key: value' lines")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    values = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            raise click.UsageError(f"--recipe {path}: no setting is called '{key}'; the nearest is '{close[0]}'")
        values[name] = coerce(value, hints[name], f"--recipe {path}: {key}", fields[name].metadata["choices"])
    return values


def _click_option(config_class: type, field: dataclasses.Field) -> Callable:
    """The decorator that adds the flag, or the positional argument, of a field."""
    scalar, many = base_type(typing.get_type_hints(config_class)[field.name])
    if field.metadata.get("argument"):
        return click.argument(field.name, type=scalar)
    default = None if field.default is dataclasses.MISSING else field.default
    names = [flag_of(field.name)]
    if scalar is bool:
        names = [f"{flag_of(field.name)}/--no-{field.name.replace('_', '-')}"]
    choice = click.Choice(field.metadata["choices"]) if field.metadata["choices"] else scalar
    return click.option(
        *names,
        field.name,
        type=None if scalar is bool else choice,
        multiple=many,
        default=default,
        show_default=default not in (None, ()),
        help=field.metadata["help"],
    )
