"""A trained model in a vLLM engine of this process, for the commands that ask it (evaluate, annotate, distill)."""

import sys
from typing import TYPE_CHECKING

from data.errors import UserError
from data.files import read_settings
from trainer.model.merge import sampler_model
from trainer.model.opening import OpenedModel, run_folder_of, run_of
from trainer.start.preflight import served_positions, unread_scaling

if TYPE_CHECKING:  # takes seconds to load
    from rollout.vllm_engine import VLLMEngine


def served_base(opened: OpenedModel) -> str:
    """The folder of the weights under the adapter, as its training held them: rounded to 4 bits after --quantize nf4."""
    settings = run_of(opened.folder).get("settings", {}) if opened.adapter is not None else {}
    quantize = settings.get("quantize", "none")
    if quantize == "none":
        return str(opened.base)
    out = run_folder_of(opened.folder)  # of the run, which sampled from the same copy
    assert out is not None, "its settings were read there"
    return sampler_model(str(opened.base), quantize, settings["dtype"], out)


def refuse_other_positions(opened: OpenedModel, longest: int) -> None:
    """Raises UserError where vLLM would rotate the positions of a trained model to frequencies that it never saw (longrope).

    Of a model that was trained elsewhere this is said only: it may know them. So is a scaling that nobody reads.
    """
    model = read_settings(opened.base / "config.json")
    trained = opened.adapter is not None or run_of(opened.folder)
    if (problem := unread_scaling(model)) and not trained:
        print(f"note: {opened.base}: {problem}", file=sys.stderr, flush=True)
    if longest <= (most := served_positions(model)):
        return
    what = (
        f"prompt and response have up to {longest} tokens, and beyond {most} vLLM takes the long factors of {opened.base} "
        "(longrope), for short prompts too"
    )
    if trained:
        raise UserError(
            f"--max-response-tokens: {what}, while this model was trained with the short ones; give {longest - most} fewer, or "
            "shorter prompts"
        )
    print(f"note: {what}; numbers with fewer tokens are of the short ones", file=sys.stderr, flush=True)


def start_engine(
    opened: OpenedModel, *, longest: int, dtype: str, memory_fraction: float, sequences: int = 256, eager: bool = False
) -> "VLLMEngine":
    """A vLLM engine in this process that holds the model. Joins the world: after engine.close(), call leave_world().

    longest: most tokens of prompt and response together. memory_fraction: share of a GPU's memory that the engine may
    use. sequences: responses asked for at a time. eager: see rollout/vllm_versions.py. Raises UserError where vLLM would
    compute another model than the one that was trained.
    """
    refuse_other_positions(opened, longest)
    from rollout.sync import Parcel
    from rollout.vllm_engine import VLLMEngine
    from trainer.ranks.world import join_world

    join_world()  # vLLM's external launcher needs a world, also for one process
    engine = VLLMEngine(
        served_base(opened),
        lora=opened.lora,
        max_model_len=longest,
        dtype=dtype,
        sequences=sequences,
        eager=eager,
        memory_fraction=memory_fraction,
    )
    if opened.adapter:
        parcel = Parcel.of(opened.adapter)
        engine.load_adapter(parcel, parcel.manifest(), version=1)  # no canary: no trainer is here to compare with
    return engine
