"""Make the parts of a run from its settings: policy, prompts, optimizer, sampler."""

import datetime
import json
import os

import torch
import torch.distributed as dist

from data.errors import UserError
from data.puzzles import Puzzle
from rollout import Engine
from rollout.link import Address, join_store, open_store
from rollout.split import SplitEngine
from trainer.config import GrpoConfig, SftConfig
from trainer.model.merge import sampler_model
from trainer.policy import Policy, Prompt
from trainer.ranks.world import World


def load_policy(cfg: GrpoConfig | SftConfig, device: torch.device, sharded: bool = False) -> Policy:
    """The base checkpoint with a new adapter (lora_B = 0): the same values on every rank, since all use one seed."""
    grpo = isinstance(cfg, GrpoConfig)
    policy = Policy(
        str(cfg.model),
        lora_rank=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        seed=cfg.seed,
        device=device,
        dtype=getattr(torch, cfg.dtype),
        sharded=sharded,
        checkpointing=cfg.checkpointing,
        frozen=grpo and cfg.beta > 0,  # the KL needs a reference; with an adapter that is the base itself
        quantize=cfg.quantize,
        autocast=cfg.autocast,
        dora=not grpo and cfg.dora,
        attn=cfg.attn,
        date=datetime.date.fromisoformat(cfg.date) if cfg.date else None,
    )
    # the SFT loop packs one response per prompt, so it has nothing to share
    cannot_share = grpo and cfg.packing == "shared" and policy.cannot_share
    if cannot_share and (not dist.is_initialized() or dist.get_rank() == 0):
        print(
            f"--packing plain, one row per response: {cfg.model} cannot share prompts, since {cannot_share}", flush=True
        )
    return policy


def make_optimizer(
    cfg: GrpoConfig | SftConfig, parameters: list[torch.nn.Parameter], betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), with its moments in the parameters' dtype or in 8 bits (arXiv:2110.02861)."""
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "betas": betas}  # lr is set again before every step
    if cfg.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


def make_engine(cfg: GrpoConfig, policy: Policy, world: World) -> Engine:
    """The sampler of this rank: in its own process, or the trainers' side of samplers in other processes."""
    if cfg.placement == "split":
        return make_split_engine(cfg, policy, world)
    if cfg.engine == "torch":
        from rollout.torch_engine import TorchEngine

        def anyone(flag: bool) -> bool:
            # only a sharded model needs the other ranks in every forward pass
            return world.largest(float(flag)) > 0 if policy.sharded else flag

        return TorchEngine(policy.model, policy.decoding, rank=world.rank, size=world.size, anyone=anyone)
    return make_vllm_engine(cfg, policy.lora, rank=world.rank, size=world.size, may_sleep=True)


def make_vllm_engine(cfg: GrpoConfig, lora: dict | None, size: int = 1, **place: int | bool) -> Engine:
    """vLLM in this process, with the run's base model. lora, size and place: keyword arguments of VLLMEngine."""
    from rollout.vllm_engine import VLLMEngine  # takes seconds to import, and the torch engine does not need it

    return VLLMEngine(
        sampler_model(str(cfg.model), cfg.quantize, cfg.dtype, cfg.out),
        lora=lora,
        max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
        dtype=cfg.dtype,
        sequences=cfg.sequences(size),
        eager=cfg.eager,
        memory_fraction=cfg.memory_fraction,
        tensor_parallel=cfg.tensor_parallel,
        nucleus=cfg.top_p < 1,
        sampler_lora=cfg.sampler_lora,
        size=size,
        **place,
    )


def make_split_engine(cfg: GrpoConfig, policy: Policy, world: World) -> SplitEngine:
    """Rank 0 opens the store where trainers and samplers meet; every rank learns its address and connects to it."""
    assert world.store is not None
    store = None
    if world.is_main:
        # a store of its own: torchrun's has no token, and listens on all interfaces
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        store, address = open_store(cfg.sync_host or os.environ["MASTER_ADDR"], cfg.sync_port, nodes)
        world.keep_alive.append(
            store
        )  # the samplers' keepers read it until the end; the server must outlive the engine
        world.store.set("sync/address", json.dumps(vars(address)))
    address = Address(**json.loads(world.store.get("sync/address")))  # blocks until rank 0 has set it
    return SplitEngine(
        address,
        store or join_store(address, f"rank {world.rank}"),
        rank=world.rank,
        size=world.size,
        samplers=cfg.sampler_ranks // cfg.tensor_parallel,
        members=cfg.tensor_parallel,
        lora=policy.lora,
        device=world.device,
        restarts=cfg.restart_samplers,
        synchronous=cfg.max_staleness == 0,
        waiting=world.waiting,
    )


def encode_prompts(policy: Policy, puzzles: list[Puzzle], cfg: GrpoConfig, world: World) -> list[Prompt]:
    """The prompts that fit --max-prompt-tokens. Raises UserError if too few are left for a step."""
    policy.chat.refuse_unwritable(label for puzzle in puzzles for label in (*puzzle.answer, *puzzle.candidates))
    prompts = [Prompt(puzzle=puzzle, ids=policy.chat.prompt_ids(puzzle.chat())) for puzzle in puzzles]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
    if len(fitting) < cfg.prompts_per_step:
        raise UserError(
            f"{cfg.puzzles}: {len(fitting)} of {len(puzzles)} puzzles fit --max-prompt-tokens {cfg.max_prompt_tokens} "
            f"(longest {max(len(p.ids) for p in prompts)}), fewer than --prompts-per-step {cfg.prompts_per_step}"
        )
    if world.is_main:
        print_notes(policy)
        unknown = policy.tokenizer.unk_token_id
        lost = sum(prompt.ids.count(unknown) for prompt in fitting) if unknown is not None else 0
        if lost:
            print(
                f"note: {lost} of {sum(len(prompt.ids) for prompt in fitting)} prompt tokens are unknown to the tokenizer "
                f"({policy.tokenizer.unk_token}): the model cannot read those genes",
                flush=True,
            )
    if world.is_main and len(fitting) < len(prompts):
        print(f"left out {len(prompts) - len(fitting)} puzzles longer than {cfg.max_prompt_tokens} tokens", flush=True)
    return fitting


def print_notes(policy: Policy) -> None:
    """Say what is unusual about how the model is asked."""
    for note in policy.chat.notes:
        print(f"note: {note}", flush=True)
