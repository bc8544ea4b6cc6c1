"""A trained model in a vLLM engine of this process, for the commands that ask it (evaluate, annotate, distill)."""

from typing import TYPE_CHECKING

from trainer.model.merge import sampler_model
from trainer.model.opening import OpenedModel, run_folder_of, run_of

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


def start_engine(
    opened: OpenedModel, *, longest: int, dtype: str, memory_fraction: float, sequences: int = 256, eager: bool = False
) -> "VLLMEngine":
    """A vLLM engine in this process that holds the model. Joins the world: after engine.close(), call leave_world().

    longest: most tokens of prompt and response together. memory_fraction: share of a GPU's memory that the engine may
    use. sequences: responses asked for at a time. eager: see rollout/vllm_versions.py.
    """
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
