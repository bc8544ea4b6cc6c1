"""Rewards: functions `fn(completion: str, puzzle: Puzzle) -> float | Reward`, sync or async, named by import path.

reward/scoring.py runs them in worker processes. reward/adapters.py adapts functions written for TRL or verl.
"""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from urllib.parse import quote, unquote

from data.errors import UserError
from data.puzzles import Puzzle
from reward.adapters import adapt
from reward.result import Reward, RewardFn, Status, as_reward, as_text

__all__ = ["Reward", "RewardFn", "Status", "as_reward", "load_reward"]


def load_reward(path: str, puzzles: Iterable[Puzzle] = ()) -> RewardFn:
    """The reward function named by `package.module:function` or `path/to/file.py:function`.

    The prefixes `trl:` and `verl:` adapt a function written for those programs (reward/adapters.py).
    Raises UserError, with the reason, when the module cannot be imported or has no such function, when the function does
    not take the arguments with which it is called, or when one of the puzzles has no column that it needs.

    >>> load_reward("reward.cellpuzzles:batch_reward").__doc__.splitlines()[0]
    'Eq. (2): -1 for an invalid format, 1 when every label is right, else 0.'
    """
    style, _, rest = path.partition(":")
    if style in ("trl", "verl") and ":" in rest:
        return adapt(style, _load_function(path, rest), path, puzzles)
    return adapt("", _load_function(path, path), path)


def _load_function(path: str, function: str) -> Callable:
    """Load `module:name`. path: the text that the user wrote, for messages."""
    module_name, colon, name = function.rpartition(":")
    if not colon or not module_name or not name:
        raise UserError(f"--reward {path}: write it as module:function or path/to/file.py:function")
    module = _load_file(path, module_name) if module_name.endswith(".py") else _load_module(path, module_name)
    fn = getattr(module, name, None)
    if fn is None:
        known = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise UserError(
            f"--reward {path}: {module_name} has no '{name}'; its functions are {', '.join(known) or 'none'}"
        )
    if not callable(fn):
        raise UserError(f"--reward {path}: '{name}' is a {type(fn).__name__}, not a function of (completion, puzzle)")
    return fn


def _load_module(path: str, module_name: str):
    if str(Path.cwd()) not in sys.path:  # `python launch/grpo.py` adds launch/ to the path, not the user's folder
        sys.path.append(str(Path.cwd()))
    return _import(path, module_name, module_name)


def _load_file(path: str, file_name: str):
    if not Path(file_name).is_file():
        raise UserError(f"--reward {path}: no file {file_name}")
    # "." separates the parts of a module's name
    return _import(path, file_name, f"{__name__}." + quote(str(Path(file_name).resolve())).replace(".", "%2E"))


def _import(path: str, shown: str, module_name: str):
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--reward {path}: cannot import {shown} ({_what_happened(error)})") from error


class _FileSpec(ModuleSpec):
    parent = ""  # the user's file is no part of our package: `from .result import x` must not find reward/result.py


class _FileFinder:
    """Finds the file of `reward./folder/mine%2Epy`, the name of the module of a user's file.

    A process pool sends a function as the name of its module and its own, so its workers must find the module by its name.
    A worker that was started, not forked, knows no file that was loaded before. Every process that imports `reward` can.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, quoted = name.partition(".")
        if package != __name__ or not quoted.startswith("/"):
            return None
        file = unquote(quoted)
        if os.path.dirname(file) not in sys.path:
            sys.path.append(os.path.dirname(file))  # for files beside it; the last folder shadows nothing
        spec = _FileSpec(name, SourceFileLoader(name, file), origin=file)
        spec.has_location = True  # the module gets its __file__
        return spec


def _what_happened(error: Exception | SystemExit) -> str:
    """In one line: an ImportError or SyntaxError speaks for itself, a KeyError('x') does not."""
    text = " ".join(as_text(error).split())
    if isinstance(error, SystemExit):
        return f'it ends the program, SystemExit: {text}; put what a script does under `if __name__ == "__main__":`'
    if isinstance(error, ImportError) and text.startswith("attempted relative import"):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        absolute = re.sub(r"from\s*\.+\s*", "from ", line).replace("from import", "import")
        return f"a reward file cannot import relatively; write `{absolute}`"
    return text if isinstance(error, ImportError | SyntaxError) else f"{type(error).__name__}: {text}"


sys.meta_path.append(_FileFinder)
