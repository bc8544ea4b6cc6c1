"""The policy: a frozen base model with a LoRA adapter. The reference policy is the same weights with the adapter off.

Also here: prompts as token ids.

Axes: N rows (responses), T tokens of the longest response, M response tokens side by side, L packed tokens, H hidden size,
V vocabulary, S tokens of the longest prompt with its response.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.prompts import ChatFormat
from data.puzzles import Puzzle
from trainer.kernels import fuse
from trainer.logprobs import fused_logprobs
from trainer.model.attention import NAMES
from trainer.model.cost import cost_of
from trainer.model.loading import (
    add_adapter,
    attention_kernels,
    head_of,
    keep_four_bits_exact,
    load_base,
    load_tokenizer,
    recompute_layers,
    why_not_shared,
)
from trainer.model.lora import fuse_adapters
from trainer.model.sharding import shard
from trainer.model.shared import SharedBase
from trainer.packing import PackedBatch
from trainer.ranks.world import full_tensor, local_shard, rows_of


class Policy:
    """A causal language model that gives log-probs of responses, with and without its adapter.

    model_dir: folder of a Hugging Face checkpoint. lora_rank 0: train every weight; then there is no adapter to switch
    off. sharded: spread the weights over the ranks (FSDP2); then every method below is collective. checkpointing: compute
    the activations of a layer again in backward instead of keeping them; keep_attention: all but its attention. frozen:
    with lora_rank 0, keep a second copy of the checkpoint's weights as the reference. quantize: "nf4" holds the linear
    layers of the base in 4 bits. autocast: matrix products in bfloat16; always so where the base is bfloat16 and an
    adapter, which stays float32, is trained on it. dora: weight-decomposed LoRA (arXiv:2402.09353). attn: "sdpa"
    (PyTorch's attention kernels), "flash" (flash-attn's) or "auto". chat: how it is asked; default: as its tokenizer says.
    base: the sampler's weights, to read the frozen ones from.

    Raises UserError when model_dir holds no checkpoint or a model that the trainer cannot compute exactly.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        lora_rank: int,
        lora_alpha: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        sharded: bool = False,
        checkpointing: bool = False,
        keep_attention: bool = False,
        frozen: bool = False,
        quantize: str = "none",
        autocast: bool = False,
        dora: bool = False,
        attn: str = "sdpa",
        chat: ChatFormat | None = None,
        base: SharedBase | None = None,
    ) -> None:
        self.chat = chat or ChatFormat(load_tokenizer(model_dir), model_dir)
        self.tokenizer = self.chat.tokenizer
        self.device, self.sharded, self.lora = device, sharded, None
        # a float32 adapter on a bfloat16 base: autocast makes the products, the small updates stay in float32
        self.autocast = autocast or (dtype == torch.bfloat16 and lora_rank > 0)
        self.trained: dict[str, torch.nn.Parameter] = {}
        self.attn = attention_kernels(model_dir, attn, device, torch.bfloat16 if self.autocast else dtype)
        self.attention = NAMES[self.attn]
        empty, self.base = sharded or base is not None, base
        self.model = self.causal_lm = load_base(model_dir, dtype, quantize, device, empty, self.attention)
        if base is not None:
            base.put_into(self.causal_lm, model_dir)
        self.cannot_share = why_not_shared(self.causal_lm.config)
        self.own_attention = self.causal_lm.config._attn_implementation if self.cannot_share else "sdpa"
        self.head = head_of(self.causal_lm, model_dir)
        self.cost = cost_of(self.causal_lm, lora_rank)  # before PEFT adds linear layers of its own
        if lora_rank:
            # PEFT changes causal_lm's own layers, so a call of causal_lm runs the adapter too
            self.model = add_adapter(self.causal_lm, lora_rank, lora_alpha, seed, sharded, dora)
            targets = sorted(self.model.peft_config["default"].target_modules)  # PEFT's set has no order
            kind = {"use_dora": True} if dora else {}
            self.lora = {"r": lora_rank, "lora_alpha": lora_alpha, "target_modules": targets, **kind}
        # the reference policy: the same weights with the adapter off, or a frozen copy where every weight is trained
        self.reference_lm = self.causal_lm
        if frozen and not lora_rank:
            reference_lm = load_base(model_dir, dtype, quantize, device, sharded, self.attention)
            self.reference_lm = reference_lm.requires_grad_(False)
        self.predicting = predicting_padded if self.cannot_share else predicting_packed
        # with an adapter both are one object, and it must be sharded once
        for causal_lm in {id(lm): lm for lm in (self.causal_lm, self.reference_lm)}.values():
            if checkpointing:
                recompute_layers(causal_lm, keep_attention)
            if sharded:
                shard(causal_lm, model_dir, seed, device, called_with=self._fused)
            causal_lm.to(device).eval()  # no dropout: sampler and trainer must agree on every log-prob
        for module in self.model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = not self.autocast  # else PEFT widens every layer's input to float32
        fuse_adapters(self.model)
        if lora_rank:
            fuse(self.causal_lm, device)
        self.model.eval()
        keep_four_bits_exact(self.model)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in the same order on every rank and in every call."""
        if self.sharded or not self.trained:  # FSDP replaces the parameter objects, so they are looked up each time
            self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return self.trained

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter under the names of PEFT's files (`base_model.model....lora_A.weight`), which vLLM reads too.

        Every rank gets the full tensors (live ones, unless sharded: clone what you keep). With lora_rank 0: every weight.
        """
        # PEFT's files leave out the adapter's name ("default"), which stands in the names of its parameters
        return {name.replace(".default.", "."): full_tensor(p.detach()) for name, p in self.trainable().items()}

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Copy in an adapter of the same names and shapes. In place: the optimizer holds these parameters."""
        for name, p in self.trainable().items():
            local_shard(p.detach()).copy_(tensors[name.replace(".default.", ".")][rows_of(p)])

    def response_logprobs(self, batch: PackedBatch, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """[N,T] log-probs of a packed batch's response tokens; 0 where there is no token.

        reference: of the reference policy (adapter off); no graph is made.
        """
        return self._forward(batch, temperature, reference=reference)[0]

    def logprobs_and_entropy(
        self, batch: PackedBatch, temperature: float, entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """([N,T] log-probs of the response tokens; [N,T] entropies of the distributions they were drawn from, in nats).

        entropy False: no pass over the logits is made for it, and None is returned.
        """
        return self._forward(batch, temperature, entropy=entropy)

    def _forward(
        self, batch: PackedBatch, temperature: float, reference: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        adapter = self.model.disable_adapter() if reference and self.lora else nullcontext()
        causal_lm = self.reference_lm if reference else self.causal_lm
        # FSDP gathers the outermost weights only around the method that sharding.shard registered
        fused = causal_lm.fused if self.sharded else partial(self._fused, causal_lm)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference), adapter:
            logprobs, entropies = fused(batch, temperature, entropy)  # [M], [M]
        if self.sharded and not logprobs.requires_grad:
            causal_lm.reshard()  # no backward will do it
        return batch.unpack(logprobs), None if entropies is None else batch.unpack(entropies)

    def _fused(
        self, causal_lm: PreTrainedModel, batch: PackedBatch, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[M] log-probs of the response tokens (and their entropies), in place of the model's own forward."""
        with matrix_products(batch.input_ids.device, self.autocast):
            hidden, head = self.predicting(causal_lm, batch), causal_lm.lm_head.weight  # [M,H], [V,H]
        # outside the autocast context: fused_logprobs chooses the dtype of every product itself
        if self.autocast:
            hidden, head = hidden.to(torch.bfloat16), head.to(torch.bfloat16)
        found = fused_logprobs(
            hidden, head, batch.targets, temperature * self.head.divisor, entropy=entropy, softcap=self.head.softcap
        )
        return found if entropy else (found, None)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """A context in which the model attends as an ordinary causal model (KV cache, left padding), for TorchEngine."""
        # transformers looks this setting up in every forward pass
        self.causal_lm.config._attn_implementation = self.own_attention
        try:
            with matrix_products(self.device, self.autocast):
                yield
        finally:
            if not self.cannot_share:
                self.causal_lm.config._attn_implementation = self.attention
            if self.sharded:
                self.causal_lm.reshard()


def matrix_products(device: torch.device, bfloat16: bool):
    """A context in which matrix products are made in bfloat16; with bfloat16 False, in the dtype of the weights."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def predicting_packed(causal_lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[M,H] last hidden states of the tokens that predict the targets, from one packed row in shared-prefix attention."""
    hidden = causal_lm.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
    ).last_hidden_state[0]  # [L,H]
    return hidden[batch.predict_at]  # so the head, the largest matrix, skips prompt tokens


def predicting_padded(causal_lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[M,H] as predicting_packed, for a model whose attention our shared-prefix attention cannot replace.

    Every response gets a row of its own with a copy of its prompt, in the model's own attention. Padding on the right is
    exact for every causal model: what follows a token does not change it.
    """
    ids, predict_at = one_row_per_response(batch)
    return causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[predict_at]


def one_row_per_response(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Undo the packing. Returns ([N,S] prompt + response, padded on the right; [M] positions in the flattened [N,S] whose
    hidden states predict the targets)."""
    own, prompts = batch.layout
    sharing = dict(zip(prompts.keys, prompts.queries, strict=True)) if prompts else {}  # prompt -> its responses
    sequences, prompt, end = [], batch.input_ids[0, :0], 0
    for first, length in own.queries:
        tokens = batch.input_ids[0, first : first + length]
        if (first, length) in sharing:
            prompt, end = tokens, sum(sharing[first, length])  # first + length: where its responses end
        else:  # a segment before `end` is a response to that prompt; one after it is a prompt with its only response
            sequences.append(torch.cat([prompt, tokens]) if first < end else tokens)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    # a token's position is its column here. Lengths of the host would be copied to the device, which waits
    return ids, batch.rows * ids.shape[1] + batch.position_ids[0, batch.predict_at]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    puzzle: Puzzle
    ids: list[int]
    """Token ids of the prompt, chat template included."""
    difficulty: float = 0.0
    """With --curriculum: 1 - the share of right answers to it."""
