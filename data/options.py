"""Fields of settings dataclasses, with the text that their flag shows (launch/options.py makes the flags); their ranges."""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import click

from data.errors import UserError

COLDEST = 0.01
"""vLLM's lowest temperature above 0."""
DTYPES = ("auto", "bfloat16", "float32")
"""Values of --dtype: how weights are held, and in what precision is computed."""
_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_BOUND = re.compile(rf"({'|'.join(_HOLDS)}) (\d\S*)")


def option(default: Any, help: str, choices: tuple[str, ...] = (), *, section: str = "") -> Any:
    """A dataclass field with the help text of its flag.

    default: dataclasses.MISSING for a required option. choices: the values that are allowed, if only some are. section:
    the heading of --help under which the flag is listed; "" for the last one.
    """
    metadata = {"help": help, "choices": choices, "section": section}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str) -> Any:
    """A dataclass field that is a positional argument of its command."""
    return dataclasses.field(metadata={"help": help, "choices": (), "section": "", "argument": True})


def check_numbers(config: Any, ranges: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError, naming flag, range and why, for a number of the settings that is outside its range or not finite.

    ranges: {range: settings}. A range is "above 0 and at most 1", or "at least 2: and why". Of the settings only those that
    the config has are looked at; None is in every range.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag_of(name)} {value}: must be a finite number")
    for text, names in ranges.items():
        bounds = [(_HOLDS[how], float(number)) for how, number in _BOUND.findall(text.partition(":")[0])]
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not all(holds(value, number) for holds, number in bounds):
                raise UserError(f"{flag_of(name)} {value}: must be {text}")


def check_endpoint(flag: str, url: str) -> None:
    """Raises UserError, without quoting the value, when a URL cannot be used, or may hold a secret: it is written down."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable or re.search(r"[\s?#@]", url):
        raise UserError(
            f"{flag}: write it as https://HOST/v1, without user, password, @ or query; the key goes into --key-env"
        )


def check_key_env(key_env: str) -> None:
    """Raises UserError, without quoting the value, when --key-env may hold the key itself."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_env):
        raise UserError("--key-env: give the NAME of an environment variable, in capitals; never the key itself")


def check_temperature(temperature: float | None) -> None:
    """Raises UserError for a temperature that vLLM would replace. 0 is greedy; None is a default."""
    if temperature is not None and 0 < temperature < COLDEST:
        raise UserError(
            f"--temperature {temperature}: vLLM samples at {COLDEST} what is below; give 0 (greedy), or at least {COLDEST}"
        )


def resolved_dtype(dtype: str, *, every_weight: bool = False, on_gpu: bool | None = None) -> str:
    """--dtype with "auto" resolved: "bfloat16" on a GPU, "float32" on a CPU, whose bfloat16 is slower.

    every_weight: all weights are trained, and not an adapter: then auto is float32 on a GPU too. A step of the optimizer
    changes a weight by about the learning rate, 1e-6, and bfloat16 numbers lie 0.4 % apart: the sum would be the old
    weight. (An adapter is held in float32 whatever its base is.) on_gpu: None looks for a GPU.
    """
    if dtype != "auto":
        return dtype
    if every_weight:
        return "float32"
    if on_gpu is None:
        import torch  # takes a second, which commands without a model need not wait for

        on_gpu = torch.cuda.is_available()
    return "bfloat16" if on_gpu else "float32"


def settle_dtype(config: Any, **how: bool | None) -> None:
    """Replace "auto" in a config's dtype by what it is here, from __post_init__: so it is recorded, and --resume compares it.

    how: see resolved_dtype.
    """
    object.__setattr__(config, "dtype", resolved_dtype(config.dtype, **how))


def flag_of(name: str) -> str:
    """The flag of a setting: max_tokens is --max-tokens."""
    return "--" + name.replace("_", "-")


def base_type(hint: Any) -> tuple[type, bool]:
    """(scalar type, is it a list) of a type hint such as `int`, `str | None` or `tuple[str, ...]`."""
    if typing.get_origin(hint) is types.UnionType:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def coerce(value: Any, hint: Any, where: str, choices: tuple[str, ...]) -> Any:
    """A YAML value as the type of its field. where: begins an error message. Raises click.UsageError."""
    scalar, many = base_type(hint)
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        raise click.UsageError(f"{where}: needs a value")
    if many:
        return tuple(coerce(v, scalar, where, choices) for v in (value if isinstance(value, list) else [value]))
    if isinstance(value, dict | list | set | tuple):  # never shown: aliases of YAML can stand for gigabytes
        raise click.UsageError(f"{where}: needs one value, not several in brackets or lines")
    if scalar is bool or isinstance(value, bool):
        if scalar is bool and isinstance(value, bool):
            return value
        raise click.UsageError(f"{where}: {value!r} is not {'true or false' if scalar is bool else scalar.__name__}")
    try:
        # YAML 1.1 reads 1e-4 as text (it wants 1.0e-4), so numbers may come as text
        if scalar is int and float(value) != int(float(value)):
            raise ValueError
        converted = int(float(value)) if scalar is int else scalar(value)
    except (TypeError, ValueError, OverflowError):
        raise click.UsageError(
            f"{where}: {repr(value)[:80]} is not {'an' if scalar is int else 'a'} {scalar.__name__}"
        ) from None
    if choices and converted not in choices:
        raise click.UsageError(f"{where}: {value!r} is not one of {', '.join(choices)}")
    return converted


def words_of(options: Iterable[str]) -> list[str]:
    """Options given as name=value, as words of a command line; a name alone is a switch."""
    return [word for item in options for word in ("--" + item).split("=", 1)]


@contextmanager
def naming(option: str, **own: str) -> Iterator[None]:
    """Turn what a command below refuses in the block into a UserError that begins with the option of the command above.

    own: {setting of the stage: option of the command above that sets it alone}.
    """
    try:
        yield
    except (click.ClickException, UserError) as error:
        why = error.format_message() if isinstance(error, click.ClickException) else str(error)
        for setting, above in own.items():
            if why.startswith(f"--{setting} "):
                raise UserError(above + why.removeprefix(f"--{setting}")) from None
        raise UserError(f"{option}: {why.removeprefix('--recipe ')}") from None
