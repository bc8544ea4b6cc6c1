"""For a model whose attention ours cannot stand in for: one row per response, padded on the right, in the model's own attention.

Right for any causal model, whatever its layers do: what follows a token does not change it.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.packing import PackedBatch


def predicting_padded(causal_lm: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """[M,H] last hidden states of the tokens that predict the targets."""
    ids, predict_at = one_row_per_response(batch)
    return causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[predict_at]


def one_row_per_response(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """([N,S] prompt + response, padded on the right; [M] where each target is predicted from, in the flattened [N,S])."""
    own, prompts = batch.layout
    sharing = dict(zip(prompts.keys, prompts.queries, strict=True)) if prompts else {}
    sequences, prompt, end = [], batch.input_ids[0, :0], 0
    for first, length in own.queries:
        tokens = batch.input_ids[0, first : first + length]
        if (first, length) in sharing:
            prompt, end = tokens, sum(sharing[first, length])
        else:  # up to `end` they are responses to that prompt; beyond it a prompt with its only response
            sequences.append(torch.cat([prompt, tokens]) if first < end else tokens)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    prompt_tokens = torch.tensor(list(map(len, sequences)), device=ids.device) - batch.mask.sum(1)
    return ids, batch.rows * ids.shape[1] + prompt_tokens[batch.rows] + batch.cols - 1
