"""Run by tests/trainer/test_shared_base.py: a command of launch/ with vLLM, in this process.

python tests/helpers/shared_base.py CASE COMMAND [OPTION ...]

CASE shared: prints "RESULT {...}" about where the trainer's frozen weights lie. CASE plain: vLLM does not pack its weights, as
under --base shared, so that two copies give the same numbers as one. CASE not_shared: as on a GPU, --base auto tries to share,
and finds that vLLM holds the model's weights in another way. CASE written: one number of a frozen weight is changed
after the first update, in a way that autograd does not count.
"""

import importlib
import json
import sys
from contextlib import nullcontext
from typing import Any

import launch  # noqa: F401 (sets variables before the libraries are imported)
from rollout.vllm_versions import plain_weights, prepare_environment
from trainer import grpo
from trainer.model.shared import NotSharedError
from trainer.start import parts

WRITTEN = "model.layers.1.self_attn.k_proj.base_layer.weight"


def look(policy: Any, engine: Any, compared: int) -> None:
    held, _ = engine.held_weights()
    of_vllm = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    frozen = {name: p for name, p in policy.causal_lm.named_parameters() if not p.requires_grad}
    storages = {p.untyped_storage().data_ptr() for p in frozen.values()}
    found = {
        "frozen": len(frozen),
        "all_in_vllm": storages <= of_vllm,
        "vllm_has_no_other": of_vllm <= storages,
        "q_is_the_first_rows": frozen["model.layers.0.self_attn.q_proj.base_layer.weight"].data_ptr()
        == held["model.layers.0.self_attn.qkv_proj.weight"].data_ptr(),
        "compared_with_its_class": compared,
    }
    print(f"RESULT {json.dumps(found)}", flush=True)


def refuse(*held: Any) -> None:
    raise NotSharedError("vLLM holds its layers in another way")


def main() -> None:
    case, command, *options = sys.argv[1:]
    sys.argv = [command, *options]
    load, made_step = parts.load_policy_and_base, grpo.optimizer_step

    compare, compared = parts.refuse_another_softmax, []

    def compare_and_count(*args: Any) -> None:
        compare(*args)
        compared.append(args)

    def load_and_look(*args: Any) -> Any:
        policy, engine = load(*args)
        look(policy, engine, len(compared))
        return policy, engine

    def step_and_write(now: Any, *args: Any) -> Any:
        now.policy.causal_lm.get_parameter(WRITTEN).data[3, 5] += 0.5
        return made_step(now, *args)

    if case == "shared":
        parts.load_policy_and_base, parts.refuse_another_softmax = load_and_look, compare_and_count
        parts.SHARES_PROMPTS, parts.RUNS_TOO = (), ()  # as if no test ran this type of model
    if case == "not_shared":
        parts.why_two_copies, parts.SharedBase = lambda *_: "", refuse
    if case == "written":
        grpo.optimizer_step = step_and_write
    if case == "plain":
        prepare_environment()  # before vLLM is imported
    with plain_weights() if case == "plain" else nullcontext():
        importlib.import_module(f"launch.{command}").main()


if __name__ == "__main__":
    main()
