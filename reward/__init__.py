"""Rewards: functions `fn(completion: str, puzzle: Puzzle) -> float | Reward`, sync or async, named by import path.

reward/scoring.py runs them in worker processes. reward/adapters.py adapts functions written for TRL or verl.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from data.errors import UserError
from reward.adapters import adapt
from reward.result import Reward, RewardFn, Status, as_reward

__all__ = ["Reward", "RewardFn", "Status", "as_reward", "load_reward"]


def load_reward(path: str) -> RewardFn:
    """The reward function named by `package.module:function` or `path/to/file.py:function`.

    The prefixes `trl:` and `verl:` adapt a function written for those programs (reward/adapters.py).
    Raises UserError, with the reason, when the module cannot be imported or has no such function.

    >>> load_reward("reward.cellpuzzles:batch_reward").__doc__.splitlines()[0]
    'Eq. (2): -1 for an invalid format, 1 when every label is right, else 0.'
    """
    style, _, rest = path.partition(":")
    if style in ("trl", "verl") and ":" in rest:
        return adapt(style, _load_function(path, rest))
    return _load_function(path, path)


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
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--reward {path}: cannot import {module_name} ({_what_happened(error)})") from error


def _load_file(path: str, file_name: str):
    if not Path(file_name).is_file():
        raise UserError(f"--reward {path}: no file {file_name}")
    name = "reward_file_" + Path(file_name).stem
    spec = importlib.util.spec_from_file_location(name, file_name)
    assert spec is not None and spec.loader is not None, "a .py path always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look their module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises while it is imported
        raise UserError(f"--reward {path}: cannot import {file_name} ({_what_happened(error)})") from error
    return module


def _what_happened(error: Exception) -> str:
    """In one line: an ImportError or SyntaxError speaks for itself, a KeyError('x') does not."""
    return str(error) if isinstance(error, ImportError | SyntaxError) else f"{type(error).__name__}: {error}"
