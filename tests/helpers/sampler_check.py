"""Run by test_grpo.py: a vLLM sampler with the adapter of a run's checkpoint, compared with the trainer's own model.

python tests/helpers/sampler_check.py CHECKPOINT RUN_CHECKPOINT

Prints RESULT, mean distance of the log-probs to the trainer's with the adapter and without, step, hash of the adapter.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from vllm import SamplingParams

from rollout import Rollout, Sampling
from rollout.sync import Canary, Parcel, SyncError
from rollout.vllm_engine import VLLMEngine
from trainer.packing import pack
from trainer.policy import Policy
from trainer.ranks.world import join_world, leave_world
from trainer.record.runfolder import load_checkpoint

PROMPT = list(range(5, 45))
SAMPLING = Sampling(n=1, max_tokens=40, temperature=1.0, top_p=1.0, seed=1, stop_ids=(2,))


def shares_prompts(engine: VLLMEngine) -> None:
    """The responses of a group share the blocks of their prompt (128 tokens each on a CPU)."""
    prompt = [{"prompt_token_ids": [5 + i % 50 for i in range(200)]}]
    sampling = SamplingParams(n=4, max_tokens=2)
    (output,) = engine.llm.generate(prompt, sampling, lora_request=engine.request, use_tqdm=False)
    assert output.num_cached_tokens >= 128


def tells_of_each_group(engine: VLLMEngine) -> None:
    """Of each prompt when its responses have ended, while others are sampled; what is told is what is returned."""
    told, seen = {}, []

    def tell(place: int, group: list[Rollout]) -> None:
        told[place] = group
        seen.append(engine.llm.llm_engine.has_unfinished_requests())

    sampling = replace(SAMPLING, n=3, max_tokens=200, stop_ids=tuple(range(3, 3000, 12)))  # some 12 tokens each
    for again in range(2):  # vLLM's numbers of requests go on
        told.clear()
        groups = engine.generate(list("abcd"), [PROMPT[i:] for i in (0, 5, 0, 9)], sampling, finished=tell)
        assert sorted(told) == [0, 1, 2, 3] and all(told[place] is groups[place] for place in told), again
        assert [len(group[0].prompt_ids) for group in groups] == [40, 35, 40, 31]
    lengths = [max(len(rollout.response_ids) for rollout in group) for group in groups]
    assert len(set(lengths)) > 1 and any(seen), "all were told of at the end"
    assert [max(len(r.response_ids) for r in told[place]) for place in told] == sorted(lengths), "the shortest first"
    assert "step" not in vars(engine.llm.llm_engine), "vLLM is left as it was"


def refuses_zeros(engine: VLLMEngine, policy: Policy, canary: Canary, version: int) -> None:
    """The canary notices an adapter of zeros."""
    wrong = {name: t * 0 if "lora_B" in name else t.clone() for name, t in policy.adapter_tensors().items()}
    parcel = Parcel.of(wrong)
    engine.load_adapter(parcel, parcel.manifest(), version=version)
    try:
        engine.prove(canary)
    except SyncError as error:
        assert "nearer to the policy without its adapter" in str(error)
    else:
        raise AssertionError("the canary must notice an adapter of zeros")


def main(base: str, run_checkpoint: str) -> None:
    join_world()
    policy = Policy(base, lora_rank=8, lora_alpha=16, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    step, adapter, _ = load_checkpoint(Path(run_checkpoint))
    policy.load_adapter(adapter)
    engine = VLLMEngine(base, lora=policy.lora, max_model_len=256, sampler_lora="kernel")
    parcel = Parcel.of(adapter)
    engine.load_adapter(parcel, parcel.manifest(), version=step)
    (rollout,) = engine.generate(["x"], [PROMPT], SAMPLING)[0]
    shares_prompts(engine)
    tells_of_each_group(engine)
    (again,) = engine.generate(["x"], [PROMPT], SAMPLING)[0]
    assert again.response_ids == rollout.response_ids, "the same seed must sample the same response"
    batch, text = pack([(PROMPT, [rollout.response_ids])]), pack([(PROMPT[:1], [PROMPT[1:]])])
    with torch.no_grad():
        on, off = (policy.response_logprobs(batch, reference=reference)[0] for reference in (False, True))
        known, base_known = (policy.response_logprobs(text, reference=off)[0].tolist() for off in (False, True))
    canary = Canary(ids=PROMPT, policy=known, reference=base_known, tolerance=1e-4)
    sampler_on, sampler_off = engine.prove(canary)
    assert canary.check(sampler_on, sampler_off) < 1e-5 and sampler_on != sampler_off
    refuses_zeros(engine, policy, canary, step + 1)
    sampler = torch.tensor(rollout.sampler_logprobs)
    distances = [(sampler - own).abs().mean().item() for own in (on, off)]
    print("RESULT", *distances, step, rollout.adapter_hash)
    engine.close()
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
