"""Where the kernels run, and whether one gives the numbers of the code whose place it takes."""

from collections.abc import Callable

import torch
from torch import Tensor


def runs_on(x: Tensor) -> bool:
    """Do the kernels run where a tensor is, at its precision? They compute in float32."""
    return x.is_cuda and x.dtype != torch.float64


@torch.enable_grad()
def gives_the_same(own: Callable, fused: Callable, *inputs: Tensor) -> bool:
    """Do two functions of float32 tensors have the same outputs and gradients? Not if one of them fails."""
    found = []
    for function in (own, fused):
        leaves = [x.detach().requires_grad_() for x in inputs]
        try:
            outs = function(*leaves)
            outs = outs if isinstance(outs, tuple) else (outs,)
            sum((out * out).sum() for out in outs).backward()
        except Exception:  # noqa: BLE001 (whatever other people's code raises that wants other arguments)
            return False
        found.append([*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)])
    return all(float((a - b).norm()) <= 1e-4 * float(a.norm()) for a, b in zip(*found, strict=True))
