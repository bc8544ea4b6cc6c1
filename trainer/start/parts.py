"""The parts of a run, made from its settings, and its beginning and end: the same for GRPO and PPO."""

import datetime
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.errors import UserError
from data.prompts import RESPONSE_LAYOUT, ChatFormat, normalise_label
from data.puzzles import Puzzle
from reward.result import nothing_usable
from reward.scoring import Scorer
from rollout import Engine
from rollout.link import Address, join_store, open_store
from rollout.split import SplitEngine
from trainer.config import OnlineConfig, TrainingConfig
from trainer.model.loading import INSTEAD, RUNS_TOO, SHARES_PROMPTS, load_tokenizer
from trainer.model.merge import sampler_model
from trainer.model.shared import (
    NotSharedError,
    SharedBase,
    base_refused,
    has_bfloat16_products,
    sampler_dtype,
    why_two_copies,
    with_sampler_dtype,
)
from trainer.packing import ScoredGroup, pack
from trainer.policy import Policy, Prompt
from trainer.prompts.validation import HeldOut, Validator
from trainer.ranks.world import StopRequest, World
from trainer.record.runfolder import (
    FINISHED,
    check_run,
    has_steps,
    open_run,
    restore_training,
    settings_of_run,
    steps_saved,
    with_date,
    write_json,
)
from trainer.record.steplog import StepLog, set_first_step_aside

PASS_RATE = "pass_rate"
"""Metadata of a puzzle with --curriculum: the share of answers to it that are right, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the functions of an optimizer step share. Nothing here is replaced while it runs."""

    step: int
    """From 0; files, messages and metrics count from 1."""
    cfg: OnlineConfig
    policy: Policy
    optimizer: torch.optim.Optimizer
    world: World
    out: Path
    """The run folder."""
    critic: Any = None
    """PPO's (trainer/ppo/critic.py); GRPO has none."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run on one rank; GRPO and PPO have the same."""

    start: Step
    """The run's first step."""
    prompts: list[Prompt]
    scorer: Scorer
    engine: Engine
    validator: Validator
    pending: dict[str, list]
    """Rollouts that are sampled but not yet trained on, of the checkpoint that the run goes on from."""
    log: StepLog | None
    """None on every rank but the first."""
    stop: StopRequest


def prepare(
    cfg: OnlineConfig,
    puzzles: list[Puzzle],
    world: World,
    held_out: HeldOut | None = None,
    make_critic: Callable = lambda *_: None,
) -> Run:
    """Check, load and restore all that a run needs. Collective.

    held_out: of --validate. make_critic(policy, cfg): for PPO. Raises UserError for settings or data that the user must change.
    """
    check_run(cfg)  # before a model is loaded
    refuse_to_replace(Path(cfg.out), *["best"] * cfg.keep_best)
    cfg = with_sampler_dtype(with_date(cfg, world), torch.cuda.is_available(), settings_of_run(cfg))
    # CPUs of two kinds take rank 0's
    cfg = replace(cfg, sampler_dtype=world.gather_in_rank_order(cfg.sampler_dtype)[0])
    stop = StopRequest(world)  # SIGTERM from now on means: finish the step, save, exit 0
    chat = chat_of(cfg)
    # before vLLM is started (--base shared), which takes a minute: too few puzzles that fit are refused at once
    prompts = encode_prompts(chat, puzzles, cfg, world)
    validator = Validator(cfg, chat, world, Path(cfg.out), held_out)
    policy, engine = load_policy_and_base(cfg, world, chat)
    cfg = replace(cfg, attn=policy.attn)  # what auto took: a replay must know
    critic = make_critic(policy, cfg)
    scorer = Scorer(cfg.reward, cfg.reward_workers, cfg.reward_seconds, on_reply=world.advance)
    out = open_run(cfg, world)  # only now: settings and data are checked
    optimizer = make_optimizer(cfg, list(policy.trainable().values()))
    first_step, pending = restore_training(out, policy, optimizer, world, critic) if cfg.resume else (0, {})
    validator.restore()
    if cfg.engine == "vllm":
        share_sampler_base(cfg, world)
    engine = engine or make_engine(cfg, policy, world)
    scorer.start()  # they get ready while the first responses are sampled; a GPU's memory is vLLM's before it is a reward's
    return Run(
        start=Step(step=first_step, cfg=cfg, policy=policy, optimizer=optimizer, world=world, out=out, critic=critic),
        prompts=prompts,
        scorer=scorer,
        engine=engine,
        validator=validator,
        pending=pending,
        log=StepLog(out, cfg, first_step) if world.is_main else None,
        stop=stop,
    )


def finish(run: Run) -> None:
    """Close the parts of a run, and mark the run folder as finished."""
    cfg, out = run.start.cfg, run.start.out
    if run.log is not None:
        run.log.close()
        if steps_saved(out) == cfg.steps:  # else SIGTERM ended it early
            write_json(out / FINISHED, {"steps": cfg.steps})
    run.scorer.close()
    run.engine.close()


def share_sampler_base(cfg: TrainingConfig, world: World) -> None:
    """Rank 0 writes the copy that vLLM reads under --quantize nf4; the others find it. Collective.

    Not each rank under a lock: where a disk has none that works, they would remove one another's.
    """
    if cfg.quantize != "none":
        if world.is_main:
            sampler_model(str(cfg.model), cfg.quantize, cfg.dtype, str(cfg.out))
        world.total(0)


def load_policy_and_base(cfg: OnlineConfig, world: World, chat: ChatFormat) -> tuple[Policy, Engine | None]:
    """(the policy; the sampler, where it is started first because the policy reads its frozen base: --base).

    Says in one line what is in memory. Raises UserError for --base shared where there must be two copies.
    """
    why = why_two_copies(cfg, world.device.type == "cuda")
    if why and cfg.base == "shared":
        raise UserError(base_refused(why))
    policy, engine = None, None
    if not why:
        lora = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": []}
        place = {"rank": world.rank, "size": world.size, "may_sleep": True}
        engine = make_vllm_engine(cfg, lora, **place, shares_weights=True)
        try:
            policy = load_policy(cfg, world.device, base=SharedBase(*engine.held_weights()), chat=chat)
        except NotSharedError as problem:  # of a model type that vLLM holds in another way
            why = str(problem)
            if cfg.base == "shared":
                raise UserError(base_refused(why)) from None
            engine.shares_weights = False
            engine.sleep()  # else the KV cache would be in the way of the trainer's copy
    if world.is_main and cfg.engine == "vllm":
        what = f"two copies, the trainer's and the sampler's: {why}" if why else "one copy, which the sampler reads too"
        print(f"frozen base in memory: {what}", flush=True)
    policy = policy or load_policy(cfg, world.device, cfg.shard == "fsdp", chat=chat)
    if engine is not None:
        engine.lora = policy.lora  # with the names of its layers, which only the policy knows
    return policy, engine


def chat_of(cfg: TrainingConfig) -> ChatFormat:
    """How the run's model is asked, on the run's date."""
    date = datetime.date.fromisoformat(cfg.date) if cfg.date else None
    return ChatFormat(load_tokenizer(str(cfg.model)), str(cfg.model), date)


def load_policy(
    cfg: TrainingConfig,
    device: torch.device,
    sharded: bool = False,
    base: SharedBase | None = None,
    chat: ChatFormat | None = None,
) -> Policy:
    """The base checkpoint with a new adapter (lora_B = 0): the same values on every rank, since all use one seed."""
    autocast = cfg.autocast and has_bfloat16_products(device)
    if cfg.autocast and not autocast and cfg.dtype == "float32" and os.environ.get("RANK", "0") == "0":
        print(
            "note: --autocast is left out: this CPU has no instructions for bfloat16 and would take longer", flush=True
        )
    if not cfg.lora_rank and cfg.dtype == "bfloat16" and os.environ.get("RANK", "0") == "0":
        print(
            "note: --lora-rank 0 with --dtype bfloat16: weights of 8 bits round most steps away; --dtype float32 keeps them",
            flush=True,
        )
    online = isinstance(cfg, OnlineConfig)
    policy = Policy(
        str(cfg.model),
        lora_rank=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        seed=cfg.seed,
        device=device,
        dtype=getattr(torch, cfg.dtype),
        sharded=sharded,
        checkpointing=cfg.checkpointing,
        keep_attention=cfg.keep_attention,
        frozen=online and cfg.beta > 0,  # the KL needs a reference; with an adapter that is the base itself
        quantize=cfg.quantize,
        autocast=autocast,
        dora=not online and cfg.dora,
        attn=cfg.attn,
        chat=chat or chat_of(cfg),
        base=base,
    )
    if not sharded:
        refuse_another_softmax(policy, str(cfg.model))
    # the SFT loop packs one response per prompt, so it has nothing to share
    cannot_share = online and cfg.packing == "shared" and policy.cannot_share
    if cannot_share and (not dist.is_initialized() or dist.get_rank() == 0):
        print(
            f"--packing plain, one row per response: {cfg.model} cannot share prompts, since {cannot_share}", flush=True
        )
    return policy


@torch.no_grad()
def refuse_another_softmax(policy: Policy, model_dir: str) -> None:
    """Raises UserError when our log-probs of a model type that no test runs are not those of its own class.

    Some scale or cap the logits in ways that `head_of` does not know; trained so, it would be another model.
    """
    lm = policy.causal_lm
    if lm.config.model_type in (*SHARES_PROMPTS, *RUNS_TOO):
        return
    ids = list(range(1, 17))
    ours = policy.response_logprobs(pack([(ids[:1], [ids[1:]])], policy.device))[0]
    with policy.decoding():
        logits = lm(input_ids=torch.tensor([ids], device=policy.device), use_cache=False).logits[0, :-1].float()
    theirs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:], device=policy.device)[:, None])[:, 0]
    distance = (ours - theirs).abs().mean().item()
    if not distance <= 0.05:  # nats; of bfloat16, and nan is a failure too
        raise UserError(
            f"--model {model_dir}: the log-probs of this {lm.config.model_type} would be others than those of its own class in "
            f"transformers ({distance:.3g} nats on average), so another model would be trained; {INSTEAD}"
        )


def make_optimizer(
    cfg: TrainingConfig, parameters: list[torch.nn.Parameter], betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), with its moments in the parameters' dtype or in 8 bits (arXiv:2110.02861)."""
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "betas": betas}  # lr is set again before every step
    if cfg.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


def make_engine(cfg: OnlineConfig, policy: Policy, world: World) -> Engine:
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


def make_vllm_engine(cfg: OnlineConfig, lora: dict | None, size: int = 1, **place: int | bool) -> Engine:
    """vLLM in this process, with the run's base model. lora, size and place: keyword arguments of VLLMEngine."""
    from rollout.vllm_engine import VLLMEngine  # takes seconds to import, and the torch engine does not need it

    return VLLMEngine(
        sampler_model(str(cfg.model), cfg.quantize, cfg.dtype, cfg.out),
        lora=lora,
        max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
        dtype=sampler_dtype(cfg, torch.cuda.is_available()),
        base_dtype=cfg.dtype,
        sequences=cfg.sequences(size),
        eager=cfg.eager,
        memory_fraction=cfg.memory_fraction,
        tensor_parallel=cfg.tensor_parallel,
        nucleus=cfg.top_p < 1,
        sampler_lora=cfg.sampler_lora,
        size=size,
        **place,
    )


def make_split_engine(cfg: OnlineConfig, policy: Policy, world: World) -> SplitEngine:
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
        world.store.set(
            "sync/dtype", cfg.sampler_dtype
        )  # auto was settled here; another CPU would settle it differently
        world.store.set("sync/address", json.dumps(vars(address)))
    address = Address(**json.loads(world.store.get("sync/address")))  # blocks until rank 0 has set it
    engine = SplitEngine(
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
    world.at_failure.append(engine.abandon)
    return engine


def encode_prompts(chat: ChatFormat, puzzles: list[Puzzle], cfg: OnlineConfig, world: World) -> list[Prompt]:
    """The prompts that fit --max-prompt-tokens. Raises UserError if too few are left for a step."""
    chat.refuse_unwritable(label for puzzle in puzzles for label in (*puzzle.answer, *puzzle.candidates))
    difficulty = [1 - puzzle.meta[PASS_RATE] if cfg.curriculum else 0.0 for puzzle in puzzles]
    prompts = [
        Prompt(puzzle=puzzle, ids=chat.prompt_ids(puzzle.chat()), difficulty=hard)
        # of half a million puzzles it takes minutes
        for puzzle, hard in world.paced(list(zip(puzzles, difficulty, strict=True)))
    ]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
    if len(fitting) < cfg.prompts_per_step:
        raise UserError(
            f"{cfg.puzzles}: {len(fitting)} of {len(puzzles)} puzzles fit --max-prompt-tokens {cfg.max_prompt_tokens} "
            f"(longest {max(len(p.ids) for p in prompts)}), fewer than --prompts-per-step {cfg.prompts_per_step}"
        )
    if world.is_main:
        print_notes(chat)
        if odd := [puzzle.id for puzzle in puzzles if not answer_is_offered(puzzle)]:
            print(
                f"note: the answer of {len(odd)} puzzles, such as {odd[0]}, is not made of their candidates: no response that "
                "follows the prompt is right",
                flush=True,
            )
        taken = cfg.steps * cfg.prompts_per_step
        of_pass = len(fitting) // cfg.prompts_per_step * cfg.prompts_per_step
        if cfg.curriculum and taken < of_pass:
            print(
                f"note: --curriculum: {cfg.steps} steps take the {taken} easiest of {of_pass} puzzles, and none of the "
                "others",
                flush=True,
            )
        if note := note_on_warmup(cfg.warmup_steps, cfg.steps):
            print(f"note: {note}", flush=True)
        unknown = chat.tokenizer.unk_token_id
        lost = sum(prompt.ids.count(unknown) for prompt in fitting) if unknown is not None else 0
        if lost:
            print(
                f"note: {lost} of {sum(len(prompt.ids) for prompt in fitting)} prompt tokens are unknown to the tokenizer "
                f"({chat.tokenizer.unk_token}): the model cannot read those genes",
                flush=True,
            )
    if world.is_main and len(fitting) < len(prompts):
        print(f"left out {len(prompts) - len(fitting)} puzzles longer than {cfg.max_prompt_tokens} tokens", flush=True)
    return fitting


def note_on_warmup(warmup_steps: int, steps: int) -> str:
    """A note where the warm-up is longer than the run; "" elsewhere.

    >>> note_on_warmup(20, 18)
    '--warmup-steps 20: the run has 18 steps, so its rate never reaches --lr'
    """
    return f"--warmup-steps {warmup_steps}: the run has {steps} steps, so its rate never reaches --lr" * (
        warmup_steps > steps
    )


def answer_is_offered(puzzle: Puzzle) -> bool:
    """Is every label of the answer a candidate, and in a batch each of them the label of one cell?"""
    answer, candidates = (Counter(map(normalise_label, names)) for names in (puzzle.answer, puzzle.candidates))
    return puzzle.variant == "open" or (answer == candidates if puzzle.variant == "batch" else answer <= candidates)


def refuse_to_replace(out: Path, *names: str) -> None:
    """Raises UserError when a new run in OUT would replace what no run has made there."""
    for name in names if not has_steps(out) else ():
        if os.path.lexists(out / name):
            raise UserError(
                f"--out {out}: holds {name}, and no run that made it; it would be replaced: name another folder"
            )


def print_notes(chat: ChatFormat) -> None:
    """Say what is unusual about how the model is asked."""
    for note in chat.notes:
        print(f"note: {note}", flush=True)


def refuse_a_useless_start(
    cfg: OnlineConfig, policy: Policy, world: World, out: Path, sampled: list[ScoredGroup]
) -> None:
    """Raises UserError, with the reasons, when no response of the first step, on any rank, can be learned from. Collective.

    A reward of the user's own may know no layout: that no response has the puzzle's is then said, and the run goes on.
    """
    rows = [row for group in sampled for row in group.rows]  # every rank has all rows
    problem, chat = nothing_usable(rows), policy.chat
    prompt = policy.tokenizer.decode(sampled[0].rollouts[0].prompt_ids[-16:])
    asked = f"The prompt ends in {prompt[-40:]!r}" + "".join(f", and {note}" for note in chat.notes)
    kept = set_first_step_aside(out, world.is_main) if problem else out
    world.largest(0.0)  # rank 0 has written them before any rank ends the run
    if problem:
        scored = any(row["reward"] is not None for row in rows)
        hint = "Is the cold start missing (launch/sft.py), or is --max-response-tokens too small?"
        raise UserError(
            f"step 1: {problem}; all are in {kept / 'rollouts.jsonl'}. {asked}. "
            f"{hint if scored else f'Does --reward {cfg.reward} score such responses?'} The same folder takes the command "
            "with what was mended, or with --insist to go on all the same"
        )
    if world.is_main and not any(RESPONSE_LAYOUT.fullmatch(row["completion"]) for row in rows):
        print(
            f"note: none of the {len(rows)} responses of step 1 has the layout <think>...</think> <answer>...</answer> that "
            f"the prompt asks for and launch/evaluate.py reads, although --reward {cfg.reward} scored them. {asked}",
            flush=True,
        )
