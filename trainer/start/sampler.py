"""A rank that samples (--placement split): a keeper, which beats, restarts and reports, and the process it keeps.

The keeper is the rank torchrun started; it loads no model, so that a sampler may die and be started again without the launcher
ending the run. The kept process (`python -m trainer.start.sampler`) gets its settings, the token among them, on standard input,
and ends with its keeper.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import IO

import torch
import torch.distributed as dist

from data.processes import end_with_parent, module_environment
from rollout import LocalEngine, Sampling
from rollout.link import Address, join, serve
from rollout.split import SamplerEnd, SplitEngine
from rollout.sync import RunError, SyncError
from trainer.config import GrpoConfig
from trainer.model.merge import sampler_model
from trainer.policy import Policy
from trainer.ranks.world import World, own_device

STATUS = "@status "
"""Lines of the kept process that begin so tell the keeper where it is."""


def keep(cfg: GrpoConfig, world: World) -> None:
    """The whole work of a rank that samples. Raises RunError when its sampler died and may not be started again."""
    assert world.store is not None and world.sampler is not None
    signal.signal(signal.SIGTERM, lambda *_: None)  # the trainers finish their step, and then say stop
    engine, member = divmod(world.sampler, cfg.tensor_parallel)
    with world.waiting("the trainers"):
        address = Address(**json.loads(_await(world.store, "sync/address")))
    store = join(address, f"sampler {engine}")
    for generation in range(cfg.restart_samplers + 1):
        lost = f"e{engine}/g{generation}/lost"
        process = _start(cfg, address, engine, member, generation)
        reader = threading.Thread(target=_listen, args=(process.stdout, world), daemon=True)
        reader.start()
        if world.watch:
            world.watch.on_hang = partial(process.send_signal, signal.SIGUSR1)  # it prints its stacks
        while process.poll() is None and not store.check([lost]):
            time.sleep(0.1)
        if process.poll() == 0 or (process.poll() is not None and world.watch and world.watch.me.phase == "stop"):
            return  # its work was done, whatever its libraries said at the end
        process.kill()  # another process of the same sampler died
        code = process.wait()
        reader.join(timeout=5)
        if not store.check([lost]):
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            where = f"phase '{world.watch.me.phase}'" if world.watch else "its work"
            step = f" of step {world.watch.me.step}" if world.watch and world.watch.me.step else ""
            store.set(
                lost,
                f"sampler {engine} ({world.watch.me if world.watch else ''}, its process {process.pid}) {how} in "
                f"{where}{step}",
            )
    with world.waiting("the trainers to stop"):
        time.sleep(5)  # they have something to say first: torchrun ends all ranks when one fails
    raise RunError(f"{store.get(lost).decode()}; --restart-samplers {cfg.restart_samplers} allows no further start")


def make_split_engine(cfg: GrpoConfig, policy: Policy, world: World) -> SplitEngine:
    """Open the store where trainers and samplers meet (rank 0), tell every rank of the launch its address, and join it."""
    assert world.store is not None
    store = None
    if world.is_main:
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        store, address = serve(cfg.sync_host or os.environ["MASTER_ADDR"], cfg.sync_port, nodes)
        world.held.append(store)  # the keepers read it to the end
        world.store.set("sync/address", json.dumps(vars(address)))
    address = Address(**json.loads(world.store.get("sync/address")))
    return SplitEngine(
        address,
        store or join(address, f"rank {world.rank}"),
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


def _await(store: dist.Store, key: str) -> bytes:
    while not store.check([key]):
        time.sleep(0.05)
    return store.get(key)


def _start(cfg: GrpoConfig, address: Address, engine: int, member: int, generation: int) -> subprocess.Popen:
    spec = {
        "keeper": os.getpid(),
        "config": dataclasses.asdict(cfg),
        "address": vars(address),
        "engine": engine,
        "member": member,
        "generation": generation,
        "local_size": int(os.environ["LOCAL_WORLD_SIZE"]),
    }
    env = module_environment() | {"LOCAL_RANK": os.environ["LOCAL_RANK"]}
    env |= {"RANK": str(member), "WORLD_SIZE": str(cfg.tensor_parallel)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.start.sampler"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec) + "\n")
    process.stdin.flush()
    return process


def _listen(lines: IO[str], world: World) -> None:
    """Pass on what the kept process prints; its status goes to the watch."""
    for line in lines:
        if line.startswith(STATUS):
            status = json.loads(line.removeprefix(STATUS))
            world.enter(status["phase"], status["step"])
            if world.watch:
                world.watch.me.waiting = status["waiting"]
        else:
            print(line, end="", flush=True)


# ---- the kept process


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    end_with_parent(spec["keeper"])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    cfg, address = GrpoConfig(**spec["config"]), Address(**spec["address"])
    device = own_device(int(os.environ["LOCAL_RANK"]), spec["local_size"])
    status("load", 0)
    end = SamplerEnd(address, spec["engine"], spec["member"], cfg.tensor_parallel, spec["generation"], device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=spec["member"],
        world_size=cfg.tensor_parallel,
        store=dist.PrefixStore(f"{end.prefix}/world", end.store),
    )
    engine = make_engine(cfg, spec["engine"], spec["member"], device)
    end.hello()
    work(end, engine)
    engine.close()
    if dist.is_initialized():  # vLLM takes it down with itself
        dist.destroy_process_group()


def work(end: SamplerEnd, engine: LocalEngine) -> None:
    """Carry out orders until the last."""
    while True:
        status("idle", 0, waiting="orders")
        try:
            order = end.next_order()
        except dist.DistError:
            sys.exit(f"the trainers' store at {end.address.host}:{end.address.port} is gone, so this sampler ends")
        status(order["do"], order.get("step", -1) + 1)
        try:
            answer = carry_out(order, end, engine)
        except RunError as error:  # the trainers stop, and say why
            end.answer(error=str(error), sync=isinstance(error, SyncError))
            continue
        end.answer(**answer)
        if order["do"] == "stop":
            return


def carry_out(order: dict, end: SamplerEnd, engine: LocalEngine) -> dict:
    """One order; returns the answer."""
    if order["do"] == "load":
        manifest = [(name, tuple(shape), dtype, crc) for name, shape, dtype, crc in order["manifest"]]
        engine.lora = order["lora"]
        engine.load_adapter(end.receive(manifest), manifest, order["version"])
        off = engine.prompt_logprobs(order["canary"], adapter=False) if order["want_off"] else None
        return {"on": engine.prompt_logprobs(order["canary"]), "off": off}
    if order["do"] == "generate":
        start = time.perf_counter()
        groups = engine.generate(order["puzzle_ids"], order["prompts"], Sampling(**order["sampling"]))
        if end.member == 0:
            seconds = time.perf_counter() - start
            end.deliver_rollouts(order["step"], order["places"], groups, engine.version, engine.hash, seconds)
    return {}


def make_engine(cfg: GrpoConfig, engine: int, member: int, device: torch.device) -> LocalEngine:
    """The sampler, with a model of its own."""
    assert cfg.model is not None
    if cfg.engine == "torch":
        from rollout.torch_engine import TorchEngine

        policy = Policy(
            cfg.model,
            lora_rank=cfg.lora_rank,
            lora_alpha=cfg.lora_alpha,
            seed=cfg.seed,
            device=device,
            dtype=getattr(torch, cfg.dtype),
            quantize=cfg.quantize,
            autocast=cfg.autocast,
        )
        return TorchEngine(policy.model, policy.eos_id, policy.decoding, adopt=policy.load_adapter)
    from rollout.vllm_engine import VLLMEngine

    lora = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": []} if cfg.lora_rank else None
    base = sampler_model(cfg.model, cfg.quantize, cfg.dtype, cfg.out)
    return VLLMEngine(
        base,
        lora=lora,
        max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
        dtype=cfg.dtype,
        memory_fraction=cfg.memory_fraction,
        rank=engine * cfg.tensor_parallel + member,
        tensor_parallel=cfg.tensor_parallel,
    )


def status(phase: str, step: int, waiting: str = "") -> None:
    print(STATUS + json.dumps({"phase": phase, "step": step, "waiting": waiting}), flush=True)


if __name__ == "__main__":
    main()
