"""Code that runs inside a vLLM worker (`worker_extension_cls`): it puts adapter tensors into vLLM's LoRA slots.

vLLM packs q/k/v and gate/up into one module each, so "modules bound" counts vLLM's modules, not PEFT's.
"""

from torch import Tensor

from rollout.sync import Manifest, verify


class LoRAWorker:
    """Mixed into vLLM's worker class; `self` is the worker."""

    def set_adapter(
        self, tensors: dict[str, Tensor], manifest: Manifest, config: dict, adapter_id: int
    ) -> tuple[int, int]:
        """Replace whatever adapter is loaded by `tensors`; returns (PEFT modules given, vLLM modules bound).

        config: PEFT's r, lora_alpha, target_modules. Raises RuntimeError naming a tensor that arrived damaged or unbound.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        verify(tensors, manifest)
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper.from_dict({**config, "peft_type": "LORA"}),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
        )
        given = len(lora.loras)
        if 2 * given != len(tensors):
            raise RuntimeError(
                f"LoRA sync: {len(tensors)} tensors made {given} adapter modules, expected {len(tensors) // 2}"
            )
        for loaded in list(manager.list_adapters()):
            adapters.remove_adapter(loaded)
        adapters.add_adapter(lora)  # packs q/k/v and gate/up in place
        adapters.activate_adapter(adapter_id)
        bound = [name for name in adapters.modules if lora.get_lora(name) is not None]
        unbound = sorted(set(lora.loras) - set(bound) - _packed_away(adapters, lora))
        if unbound or not bound:
            raise RuntimeError(f"LoRA sync: vLLM has no module for {unbound[0] if unbound else 'any adapter tensor'}")
        return given, len(bound)


def _packed_away(adapters, lora) -> set[str]:
    """Names of adapter modules that live on inside a packed vLLM module (q_proj in qkv_proj)."""
    return {
        part
        for name, parts in adapters.packed_modules.items()
        if lora.get_lora(name) is not None
        for part in parts
    }  # fmt: skip
