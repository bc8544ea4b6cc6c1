"""The Triton kernel of the head: run by Triton's interpreter against float64, and compiled for a GPU that is not here."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT

pytest.importorskip("triton")

INTERPRETED = """
import json, torch
from trainer.logprobs import passes
from trainer.kernels import head as head_kernel

head_kernel.BLOCK = 64  # blocks that are full, one that is not, and one alone
torch.manual_seed(0)
errors = {}
for vocabulary in (50, 64, 200):
    for softcap in (None, 3.0):
        for temperature in (1.0, 0.7):
            logits = 4 * torch.randn(5, vocabulary)
            logits[0, 3] = -torch.inf  # a masked word
            logits[1, 4] = 80.0  # nearly certain
            targets = torch.tensor([1, 4, 0, 49, 7])
            rest = (targets, temperature, softcap)
            exact = passes(logits.double(), *rest, torch.float64, True)
            found = head_kernel.passes(logits, *rest, torch.float32, True)
            errors[f"{vocabulary} {softcap} {temperature}"] = [float((a - b).abs().max()) for a, b in zip(found, exact)]
            half = head_kernel.passes(logits, *rest, torch.bfloat16, False)
            assert torch.equal(half[0], found[0]) and half[1] is None and half[2].dtype == torch.bfloat16
            torch.testing.assert_close(half[2].float(), found[2], rtol=2**-7, atol=1e-30)
            assert head_kernel.passes(logits, *rest, None, False)[1:] == (None, None)
broken = torch.randn(2, 100)
broken[0, 5], broken[1, 7] = torch.nan, torch.inf
broken = head_kernel.passes(broken, torch.tensor([1, 2]), 1.0, None, None, True)[:2]
assert all(torch.isnan(found).all() for found in broken), "what is not finite must be seen"
print(json.dumps(errors))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer.kernels import head as head_kernel

pointers = {"logits": "*fp32", "targets": "*i64", "logprobs": "*fp32", "entropies": "*fp32", "slopes": "*bf16"}
numbers = {"vocabulary": "i32", "temperature": "fp32", "softcap": "fp32"}
for capped, entropy in ((False, False), (True, True)):
    settings = {"CAPPED": capped, "ENTROPY": entropy, "SLOPE": True, "BLOCK": head_kernel.BLOCK}
    source = ASTSource(
        fn=head_kernel._two_passes,
        signature={**pointers, **numbers, **dict.fromkeys(settings, "constexpr")},
        constexprs=settings,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(made.asm["cubin"]) > 1000 and ".local" not in made.asm["ptx"], "registers are spilled"
"""


def python(code: str, **env: str) -> str:
    """Run in a process of its own: Triton decides when a kernel is defined whether it is interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_computes_what_pytorchs_operations_do():
    errors = json.loads(python(INTERPRETED, TRITON_INTERPRET="1"))
    assert len(errors) == 12
    for case, (logprobs, entropies, slopes) in errors.items():
        assert logprobs < 1e-5 and entropies < 1e-5 and slopes < 2e-6, case  # max() would pass over nan


@pytest.mark.slow(8)
def test_it_compiles_for_an_h100(tmp_path):
    python(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
