"""Sync manifest and the plain-torch sampler."""

import pytest
import torch

from rollout import Sampling, stable_seed
from rollout.sync import Canary, Parcel, SyncError, adapter_hash, manifest_of
from rollout.torch_engine import TorchEngine, draw_token
from trainer.packing import pack
from trainer.policy import Policy

SEED = 2382639945643606760


def test_a_flipped_bit_is_named():
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.zeros(3, 2)}
    manifest, before = manifest_of(tensors), adapter_hash(tensors)
    Parcel.of(tensors).verify(manifest)
    tensors["a.lora_B.weight"].view(torch.int32)[1, 0] ^= 1
    with pytest.raises(SyncError, match="a.lora_B.weight arrived as"):
        Parcel.of(tensors).verify(manifest)
    assert adapter_hash(tensors) != before
    del tensors["a.lora_A.weight"]
    with pytest.raises(SyncError, match="a.lora_A.weight is on one side only"):
        Parcel.of(tensors).verify(manifest)


def test_draw_token_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(4, 1)
    tokens, logprobs = draw_token(logits, torch.tensor([0.05, 0.15, 0.31, 0.999], dtype=torch.float64), 1.0, 1.0)
    assert tokens.tolist() == [0, 1, 2, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.2, 0.7, 0.7]))
    assert draw_token(logits, torch.zeros(4).double(), 0.0, 1.0)[0].tolist() == [2, 2, 2, 2]
    tokens, logprobs = draw_token(
        logits, torch.tensor([0.05, 0.1, 0.3, 0.9], dtype=torch.float64), 1.0, 0.85
    )  # drops token 0
    assert tokens.tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.7, 0.7]))  # over all three tokens


def test_stable_seed_is_stable():
    assert stable_seed(0, "sample", 3) == SEED
    assert stable_seed(0, "sample", 4) != SEED


@pytest.mark.slow(2)
def test_torch_engine_logprobs_are_the_trainers_and_do_not_depend_on_the_batch(pipeline):
    policy = Policy(
        str(pipeline / "base"), lora_rank=4, lora_alpha=8, seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    from data.puzzles import read_puzzles

    puzzles = read_puzzles(pipeline / "puzzles/test.parquet")[:3]
    prompts = [policy.chat.prompt_ids(p.chat()) for p in puzzles]
    sampling = Sampling(n=2, max_tokens=12, temperature=1.0, top_p=1.0, seed=5, stop_ids=policy.chat.stop_ids)
    engine = TorchEngine(policy.model, policy.decoding)
    groups = engine.generate([p.id for p in puzzles], prompts, sampling)
    alone = engine.generate([puzzles[2].id], [prompts[2]], sampling)
    assert [r.response_ids for r in alone[0]] == [r.response_ids for r in groups[2]]
    batch = pack([(ids, [r.response_ids for r in group]) for ids, group in zip(prompts, groups, strict=True)])
    with torch.no_grad():
        trainer_NT = policy.response_logprobs(batch)
        reference_NT = policy.response_logprobs(batch, reference=True)
    sampler = torch.tensor([x for group in groups for r in group for x in r.sampler_logprobs])
    torch.testing.assert_close(trainer_NT[batch.mask], sampler, rtol=0, atol=1e-5)
    assert (trainer_NT - reference_NT)[batch.mask].abs().mean() > 1e-2
    # ---- the canary: passes for this adapter, and tells a sampler without it
    ids = prompts[0][:40]
    text = pack([(ids[:1], [ids[1:]])])
    with torch.no_grad():
        on, off = (policy.response_logprobs(text, reference=off)[0].tolist() for off in (False, True))
    canary = Canary(ids=ids, policy=on, reference=off, tolerance=1e-4)
    sampler_on, sampler_off = engine.prove(canary)
    assert canary.check(sampler_on, sampler_off) < 1e-5 and sampler_on != sampler_off
    with (
        policy.model.disable_adapter(),
        pytest.raises(SyncError, match="it is nearer to the policy without its adapter"),
    ):
        engine.prove(canary)
