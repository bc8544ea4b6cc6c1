"""A rank that only samples (--placement split): a keeper process, and the sampler process that the keeper starts.

The keeper is the rank that torchrun started. It sends heartbeats, restarts the sampler and reports its death. It loads
no model itself: so a sampler can die and be restarted without torchrun ending the run. The sampler process (`START`)
reads its settings and the run's token from standard input. It ends with its keeper.
"""

import dataclasses
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import IO

import torch
import torch.distributed as dist

from data.errors import UserError, first_line
from data.processes import module_environment
from rollout import LocalEngine, Rollout, Sampling
from rollout.link import Address, join_store, post_notice, read_notice
from rollout.split import REFUSED, SamplerEnd, SamplerProcess, over_key
from rollout.sync import RunError, SyncError
from trainer.config import OnlineConfig
from trainer.ranks.world import World, own_device
from trainer.start.parts import load_policy, make_vllm_engine

STATUS = "@status "
"""Lines of the sampler process that begin with this tell the keeper its phase and step."""
REFUSED_CODE = 2
"""With which a sampler process ends that cannot start for a reason that the user must mend."""
REFUSED_SECONDS = 2.0
"""How long a sampler process that has said why it cannot start may take to end."""
STOP_SECONDS = 60.0
"""How long a sampler may take to stop after its last order."""
START = "import sys; from data.processes import end_with_parent; end_with_parent(int(sys.argv[1]))"
START += "; from trainer.start.sampler import main; main()"
"""Run by the sampler process. It ends with its keeper from the first: the imports alone can take half a minute."""


def keep_sampler(cfg: OnlineConfig, world: World) -> None:
    """The whole work of a rank that samples. Raises RunError if its sampler died and may not be restarted."""
    assert world.store is not None and world.sampler is not None
    # SIGTERM goes to every rank, but the trainers still need samples to finish their step; they send "stop" afterwards
    signal.signal(signal.SIGTERM, lambda *_: None)
    engine, member = divmod(world.sampler, cfg.tensor_parallel)
    with world.waiting("the trainers"):
        address = Address(**json.loads(_await(world.store, "sync/address")))
    cfg = replace(cfg, sampler_dtype=world.store.get("sync/dtype").decode())
    store = join_store(address, f"sampler {engine}")
    for generation in range(cfg.restart_samplers + 1):
        lost = f"e{engine}/g{generation}/lost"
        lost_text = partial(_notice, store, lost, address, engine)
        me = SamplerProcess(engine=engine, member=member, members=cfg.tensor_parallel, generation=generation)
        process = _start(cfg, address, me)
        reader = threading.Thread(target=_listen, args=(process.stdout, world), daemon=True)
        reader.start()
        if world.watch:
            world.watch.on_hang = partial(process.send_signal, signal.SIGUSR1)  # makes it print its stacks
        # until this process ends, or another keeper reports that its process of the same sampler has died
        ends = math.inf
        try:
            while process.poll() is None and lost_text() is None and time.monotonic() < ends:
                if _notice(store, over_key(engine), address, engine) is not None:
                    ends = min(ends, time.monotonic() + STOP_SECONDS)  # a restarted one, whom nobody will tell to stop
                time.sleep(0.1)
        except RunError:  # rank 0 has ended with its store: it may be quicker to say that this process was refused
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=REFUSED_SECONDS)
            if process.poll() != REFUSED_CODE:
                raise
        if process.poll() == 0:
            return
        if process.poll() is not None and world.watch and world.watch.me.phase == "stop":
            # it was told to stop, so a crash of a library during its exit does not matter; but rank 0 may await its answer
            post_notice(store, lost, f"sampler {engine} ended with exit code {process.poll()}", address.token)
            return
        if process.poll() == REFUSED_CODE:  # another start would be refused for the same reason
            refused = f"sampler {engine}: it cannot start; rank 0 says why"
            with suppress(RunError):  # the trainers may have said it, and be gone
                refused = _notice(store, REFUSED, address, engine) or refused
            with world.waiting("the trainers to stop"):
                time.sleep(5)  # as below
            raise UserError(refused)
        process.kill()  # still alive if another process of the same sampler died: all of them restart together
        code = process.wait()
        reader.join(timeout=5)
        if lost_text() is None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            where = f"phase '{world.watch.me.phase}'" if world.watch else "its work"
            step = f" of step {world.watch.me.step}" if world.watch and world.watch.me.step else ""
            who = f"sampler {engine} ({world.watch.me if world.watch else ''}, its process {process.pid})"
            post_notice(store, lost, f"{who} {how} in {where}{step}", address.token)
        if _notice(store, over_key(engine), address, engine) is not None:
            return  # nothing is left to sample
    with world.waiting("the trainers to stop"):
        time.sleep(5)  # let the trainers print their error first: torchrun ends all ranks as soon as one fails
    raise RunError(f"{lost_text()}; --restart-samplers {cfg.restart_samplers} allows no further start")


def _await(store: dist.Store, key: str) -> bytes:
    # polling has no time-out: the trainers load their model first, which can take longer than the store would wait
    while not store.check([key]):
        time.sleep(0.05)
    return store.get(key)


def _notice(store: dist.Store, key: str, address: Address, engine: int) -> str | None:
    """A notice in the trainers' store; None without one. Raises RunError when the store is gone."""
    try:
        return read_notice(store, key, address.token)
    except dist.DistError as error:
        raise RunError(
            f"sampler {engine}: the trainers' store at {address.host}:{address.port} is gone ({first_line(error)}): rank 0 has "
            "ended, or the network to it"
        ) from None


def _start(cfg: OnlineConfig, address: Address, me: SamplerProcess) -> subprocess.Popen:
    spec = {
        # what GRPO and PPO share is all that a sampler needs
        "config": {field.name: getattr(cfg, field.name) for field in dataclasses.fields(OnlineConfig)},
        "address": vars(address),
        "process": vars(me),
        "local_size": int(os.environ["LOCAL_WORLD_SIZE"]),
    }
    env = module_environment() | {"LOCAL_RANK": os.environ["LOCAL_RANK"]}
    env |= {"RANK": str(me.member), "WORLD_SIZE": str(cfg.tensor_parallel)}
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,  # a signal to the launch's process group must not reach it
    )
    assert process.stdin is not None
    # not on the command line, where every user of the machine could read the token
    process.stdin.write(json.dumps(spec) + "\n")
    process.stdin.flush()
    return process


def _listen(lines: IO[str], world: World) -> None:
    """Print the lines of the sampler process; pass its status lines to the watch."""
    for line in lines:
        if line.startswith(STATUS):
            status = json.loads(line.removeprefix(STATUS))
            world.enter(status["phase"], status["step"])
            if world.watch:
                world.watch.me.waiting = status["waiting"]
        else:
            print(line, end="", flush=True)


# ---- the sampler process


def main() -> None:
    """Load the model, then carry out the trainers' orders until the last."""
    spec = json.loads(sys.stdin.readline())
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    cfg, address = OnlineConfig(**spec["config"]), Address(**spec["address"])
    device = own_device(int(os.environ["LOCAL_RANK"]), spec["local_size"])
    report_status("load", 0)
    me = SamplerProcess(**spec["process"])
    end = SamplerEnd(address, me, device)
    # vLLM reads this world: the processes of one sampler, which know nothing of the trainers' world
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=me.member,
        world_size=me.members,
        store=dist.PrefixStore(f"{end.prefix}/world", end.store),
    )
    try:
        engine = make_engine(cfg, me, device)
    except UserError as error:
        if me.generation:  # it has worked before, so the user's input is not why
            raise RunError(str(error)) from error
        # the keeper and the trainers say it, and end
        post_notice(end.store, REFUSED, f"sampler {me.engine}: {error}", address.token)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REFUSED_CODE)  # at once: vLLM takes seconds to go, and by then the trainers' store is gone
    end.hello()  # only now: the trainer then makes the broadcast group, and waits for this process in it
    carry_out_orders(end, engine)
    engine.close()
    if dist.is_initialized():  # vLLM's shutdown may have destroyed it
        dist.destroy_process_group()


def carry_out_orders(end: SamplerEnd, engine: LocalEngine) -> None:
    """Carry out and answer the trainers' orders until the order to stop."""
    while True:
        report_status("idle", 0, waiting="orders")
        try:
            order = end.next_order()
        except dist.DistError:
            sys.exit(f"the trainers' store at {end.address.host}:{end.address.port} is gone, so this sampler ends")
        report_status(order["do"], order.get("step", -1) + 1)
        try:
            answer = carry_out(order, end, engine)
        except RunError as error:  # the trainers decide: they stop and print the error
            end.answer(error=str(error), sync=isinstance(error, SyncError))
            continue
        end.answer(**answer)
        if order["do"] == "stop":
            return


def carry_out(order: dict, end: SamplerEnd, engine: LocalEngine) -> dict:
    """Carry out one order. Returns the answer."""
    if order["do"] == "load":
        # JSON made lists of the manifest's tuples, which are compared with == and hashed
        manifest = [(name, tuple(shape), dtype, crc) for name, shape, dtype, crc in order["manifest"]]
        engine.lora = order["lora"]
        engine.load_adapter(end.receive(manifest), manifest, order["version"])
        off = engine.prompt_logprobs(order["canary"], adapter=False) if order["want_off"] else None
        return {"on": engine.prompt_logprobs(order["canary"]), "off": off}
    if order["do"] == "generate":
        start = time.perf_counter()

        def deliver(place: int, group: list[Rollout]) -> None:
            if end.member == 0:
                seconds = time.perf_counter() - start
                end.deliver_group(order["step"], order["places"][place], group, seconds, order["part"])

        engine.forget()  # several orders may follow one adapter; one that is repeated after a restart gives the same then
        sampling = Sampling(**order["sampling"])
        engine.generate(order["puzzle_ids"], order["prompts"], sampling, order["repeats"], deliver)
    return {}


def make_engine(cfg: OnlineConfig, me: SamplerProcess, device: torch.device) -> LocalEngine:
    """The engine of this process, with its own copy of the model."""
    if cfg.engine == "torch":
        from rollout.torch_engine import TorchEngine

        # a sampler needs no reference model and packs nothing
        policy = load_policy(replace(cfg, beta=0.0, packing="plain"), device)
        return TorchEngine(policy.model, policy.decoding, adopt=policy.load_adapter)
    lora = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": []} if cfg.lora_rank else None
    return make_vllm_engine(cfg, lora, rank=me.engine * me.members + me.member)


def report_status(phase: str, step: int, waiting: str = "") -> None:
    """Tell the keeper, on standard output, what this process does. step: 1-based, 0 for none."""
    print(STATUS + json.dumps({"phase": phase, "step": step, "waiting": waiting}), flush=True)
