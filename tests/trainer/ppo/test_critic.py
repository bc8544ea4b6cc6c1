"""The critic on the policy's base model: its values, what it shares with the policy, and what it leaves alone."""

import pytest
import torch

from rollout import Rollout
from trainer.packing import Denominators, ScoredGroup, micro_batches
from trainer.policy import Policy
from trainer.ppo.critic import Critic
from trainer.ppo.settings import PpoConfig

CPU = torch.device("cpu")


def policy_of(pipeline, **more) -> Policy:
    settings = {"lora_rank": 4, "lora_alpha": 8, "seed": 0, "device": CPU, "dtype": torch.float32}
    return Policy(str(pipeline / "base"), **{**settings, **more})


def config(pipeline, **more) -> PpoConfig:
    return PpoConfig(**{"model": str(pipeline / "base"), "lora_rank": 4, "lora_alpha": 8, **more})


def groups() -> list[ScoredGroup]:
    """Two prompts with two responses each; the values to learn are 1 everywhere."""
    made = []
    for g, responses in enumerate([[[7, 8, 9], [10]], [[11, 12], [13, 14, 15, 16]]]):
        rollouts = [
            Rollout(
                puzzle_id=str(g),
                prompt_ids=[5, 6 + g],
                response_ids=ids,
                sampler_logprobs=[0.0] * len(ids),
                finish_reason="stop",
                adapter_version=0,
                adapter_hash="",
            )
            for ids in responses
        ]
        ones = [torch.ones(len(ids)) for ids in responses]
        made.append(
            ScoredGroup(
                rollouts=rollouts,
                rows=[{}, {}],
                advantages=torch.zeros(2),
                trained=torch.ones(2, dtype=torch.bool),
                tokens={"returns": ones, "old_values": [torch.zeros_like(x) for x in ones]},
            )
        )
    return made


def learn(critic: Critic, steps: int) -> None:
    (micro,) = micro_batches(groups(), 1000, CPU)
    for _ in range(steps):
        with critic.active():
            critic.optimizer.zero_grad()
            critic.terms(micro, Denominators(4, 10)).loss.backward()
        critic.optimizer.step()


@pytest.mark.slow(2)
def test_the_critic_learns_and_leaves_the_policy_as_it_is(pipeline):
    policy = policy_of(pipeline)
    for p in policy.trainable().values():  # an adapter that does something
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
    before_names = list(policy.trainable())
    (micro,) = micro_batches(groups(), 1000, CPU)
    with torch.no_grad():
        logprobs, reference = (policy.response_logprobs(micro.packed, reference=which) for which in (False, True))
    weights = {name: p.detach().clone() for name, p in policy.trainable().items()}
    critic = Critic(policy, config(pipeline, lr=1e-2, value_clip=10.0))
    policy.trained = {}  # looked up anew
    assert list(policy.trainable()) == before_names, "the critic's adapter is none of the policy's parameters"
    assert list(policy.adapter_tensors()) == [name.replace(".default.", ".") for name in before_names]
    with torch.no_grad(), critic.active():
        assert (critic.values(micro.packed) == 0).all(), "before it has learned anything it expects 0"
    learn(critic, 30)
    with torch.no_grad(), critic.active():
        values = critic.values(micro.packed)
    assert (values[micro.mask] - 1).abs().max() < 0.2 and (values[~micro.packed.mask] == 0).all()
    moved = {name for name, p in critic.parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".lora_A." in name for name in moved) and "value_head.weight" in moved
    with torch.no_grad():
        for which, was in ((False, logprobs), (True, reference)):
            torch.testing.assert_close(policy.response_logprobs(micro.packed, reference=which), was, rtol=0, atol=0)
    torch.testing.assert_close({name: p.detach() for name, p in policy.trainable().items()}, weights, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in policy.trainable().values())


def test_the_value_of_a_token_is_read_before_it(pipeline):
    """So it knows the prompt and the tokens before, and not the token itself: its future must not leak into it."""
    policy = policy_of(pipeline)
    critic = Critic(policy, config(pipeline))
    torch.nn.init.normal_(critic.weight, generator=torch.Generator().manual_seed(1))
    whole = groups()
    (micro,) = micro_batches(whole, 1000, CPU)
    other = groups()
    other[0].rollouts[0].response_ids[2] = 99  # the last token of the first response
    (changed,) = micro_batches(other, 1000, CPU)
    with torch.no_grad(), critic.active():
        before, after = critic.values(micro.packed), critic.values(changed.packed)
        # the same from one row per response, in PyTorch's own order
        with policy.decoding():
            (hidden,) = policy.causal_lm.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    expected = hidden[1:4] @ critic.weight + critic.bias  # at the tokens 6, 7 and 8, which predict 7, 8 and 9
    torch.testing.assert_close(before[0, :3], expected, rtol=0, atol=1e-5)
    assert before[0, :3].std() > 0.1


def test_what_is_saved_is_loaded_again(pipeline):
    class Alone:
        is_main = True

    first = Critic(policy_of(pipeline), config(pipeline, lr=1e-2), Alone())
    learn(first, 2)
    first.kl.beta = 0.0625
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = Critic(policy_of(pipeline), config(pipeline, lr=1e-2), Alone())
    second.load(saved)
    assert second.kl.beta == 0.0625
    for critic in (first, second):
        learn(critic, 2)
    assert (second.weights()["value_head.weight"] != saved["weight/value_head.weight"]).any(), "it went on learning"
    # and so does what the second one saves: not what it was given
    torch.testing.assert_close(second.tensors(), first.tensors(), rtol=0, atol=0)
    torch.testing.assert_close(second.weights(), first.weights(), rtol=0, atol=0)


def test_weights_of_its_own(pipeline):
    """With --critic, and where every weight of the policy is trained: then there is no frozen base to share."""
    for rank, critic_dir in ((4, str(pipeline / "base")), (0, None)):
        policy = policy_of(pipeline, lora_rank=rank)
        before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        lengths = {"max_prompt_tokens": 512, "max_response_tokens": 512}
        critic = Critic(
            policy, config(pipeline, lora_rank=rank, critic=critic_dir, lr=1e-2, value_clip=10.0, **lengths)
        )
        assert critic.backbone is not policy and not critic.shares_base
        learn(critic, 3)
        assert all(p.grad is not None for p in critic.parameters.values()), "a parameter without a part in a value"
        torch.testing.assert_close(dict(policy.model.named_parameters()), before, rtol=0, atol=0)


def test_layers_that_run_again_in_backward_run_with_the_critics_adapter(pipeline):
    """--checkpointing: with the policy's adapter in the second run the critic's own would get no gradient."""
    settings = config(pipeline, lr=1e-2, value_clip=10.0)
    made = [Critic(policy_of(pipeline, checkpointing=again), settings) for again in (False, True)]
    for critic in made:
        learn(critic, 3)
    torch.testing.assert_close(made[1].weights(), made[0].weights(), rtol=0, atol=1e-6)
    assert all(p.grad.abs().sum() > 0 for name, p in made[1].parameters.items() if ".lora_B." in name)
