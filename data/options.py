"""Fields of settings dataclasses, with the text that their flag shows (launch/options.py makes the flags); their ranges."""

import dataclasses
import math
import operator
import re
from typing import Any

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
