"""The models that launch/evaluate.py asks: one behind an endpoint, or a checkpoint in vLLM in this process."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data.errors import RunError, UserError
from data.puzzles import Puzzle
from eval.predict import REFUSED, Answered, Ask, Partial, ask_engine, ask_teacher
from rollout import Sampling

if TYPE_CHECKING:
    from launch.evaluate import EvaluateConfig, Sets

ADAPTER_CONFIG = "adapter_config.json"
UNSERVED = (
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of PEFT that change what an adapter does, and that the engine is not told."""
PLAIN_STARTS = ("none", "true", "false", "gaussian", "eva", "orthogonal")
"""Of init_lora_weights; the others change the base too."""


def adapter_settings(folder: Path) -> dict[str, Any] | None:
    """PEFT's settings of an adapter folder; None for another. Raises UserError for a damaged file, and for an adapter that would
    be scaled wrongly, or served in part only."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the adapter again") from None
    unserved = [name for name in UNSERVED if config.get(name)]
    unserved += ["bias"] if config.get("bias", "none") != "none" else []
    unserved += [n for n in ("init_lora_weights",) if str(config.get(n)).lower() not in PLAIN_STARTS]
    if unserved:
        raise UserError(
            f"{path}: has {unserved[0]} {json.dumps(config[unserved[0]])}, with which an adapter cannot be served: merge it into "
            "its base (PEFT's merge_and_unload) and evaluate the merged checkpoint"
        )
    return config


def model_files(config: "EvaluateConfig") -> str:
    """Names the files of the model's folder, and of the base under an adapter, by name, size and time: a model that is replaced
    at the same path is another one."""
    folder = Path(str(config.model))
    adapter = adapter_settings(folder)
    base = [Path(config.base or adapter["base_model_name_or_path"])] if adapter else []
    found = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for one in (folder, *base)
        for path in sorted(one.glob("*"))
        if path.is_file()
    ]
    return f"{len(found)} files, {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}"


class Remote:
    """A model behind an OpenAI-compatible endpoint. The key stays with the client."""

    def __init__(self, config: "EvaluateConfig") -> None:
        from data.distill.meter import Meter
        from rollout.teachers.openai import Endpoint, OpenAITeacher, is_loopback

        key = os.environ.get(config.key_env, "")
        if not key and not is_loopback(str(config.endpoint)):
            raise click.UsageError(
                f"the environment variable {config.key_env} holds no key for --endpoint: set it, or name another with --key-env"
            )
        endpoint = Endpoint(
            model=str(config.model),
            base_url=str(config.endpoint),
            key=key or "EMPTY",
            temperature=float(config.temperature or 0.0),
            top_p=config.top_p if config.top_p < 1 else None,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
            concurrency=config.concurrency,
        )
        self.teacher = OpenAITeacher(endpoint, Meter(), lambda row: None, functools.partial(print, file=sys.stderr))
        self.asking = ask_teacher(self.teacher, config.samples, config.refused == "invalid")

    def resume(self, partial: Partial) -> None:
        """What an earlier run was answered shows that the settings are right, even if all that is left is refused."""
        self.teacher.answered += sum(row.get("finish_reason") != REFUSED for row in partial.rows.values())

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        """See eval.predict. Raises RunError in the words of this command's options."""
        try:
            yield from self.asking(puzzles, first)
        except RunError as error:
            raise RunError(str(error).replace("--base-url", "--endpoint")) from None

    def close(self) -> None:
        self.teacher.close()


class Local:
    """A checkpoint, or an adapter on one, in vLLM in this process; loaded when the first puzzle is asked."""

    def __init__(self, config: "EvaluateConfig", sets: "Sets") -> None:
        self.config, self.sets = config, sets
        self.asking: Ask | None = None
        self.engine = None

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterable[Answered]:
        """See eval.predict."""
        if self.asking is None:
            self.asking = self._load()
        return self.asking(puzzles, first)

    def _load(self) -> Ask:
        from rollout.sync import Parcel
        from rollout.vllm_engine import VLLMEngine
        from trainer.model.loading import load_tokenizer
        from trainer.policy import encode_prompt
        from trainer.ranks.world import join_world
        from trainer.record.runfolder import read_adapter

        config = self.config
        folder, adapter, lora = Path(str(config.model)), None, None
        if adapter_settings(folder) is not None:
            adapter, adapter_config = read_adapter(folder)
            folder = Path(config.base or adapter_config["base_model_name_or_path"])
            lora = {key: adapter_config[key] for key in ("r", "lora_alpha", "target_modules")}
        tokenizer = load_tokenizer(str(folder))

        def encode(puzzle: Puzzle) -> list[int]:
            return encode_prompt(tokenizer, puzzle.chat())

        longest = max(len(encode(puzzle)) for puzzles in self.sets.values() for puzzle in puzzles)
        join_world()
        self.engine = VLLMEngine(
            str(folder),
            lora=lora,
            max_model_len=longest + config.max_response_tokens,
            dtype=config.dtype,
            memory_fraction=config.memory_fraction,
        )
        if adapter:
            parcel = Parcel.of(adapter)
            self.engine.load_adapter(parcel, parcel.manifest(), version=1)
        sampling = Sampling(
            n=config.samples,
            max_tokens=config.max_response_tokens,
            temperature=float(config.temperature or 0.0),
            top_p=config.top_p,
            seed=config.seed,
        )
        return ask_engine(self.engine, tokenizer, encode, sampling)

    def resume(self, partial: Partial) -> None:
        """Nothing to know of."""

    def close(self) -> None:
        """Stop the engine, where one was started."""
        from trainer.ranks.world import leave_world

        if self.engine is not None:
            self.engine.close()
            leave_world()
