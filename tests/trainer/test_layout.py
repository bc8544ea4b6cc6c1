"""Layout invariance: world size, micro-batch size, packing, accumulation and row order do not change loss or gradient."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.commands import ROOT, succeed
from tests.helpers.layouts import OBJECTIVES, layouts_of

pytestmark = pytest.mark.slow(2)


@pytest.fixture(scope="module")
def results(pipeline, tmp_path_factory) -> dict[int, dict[str, torch.Tensor]]:
    """{world size: {"objective/packing/budget/shuffled/loss" or .../gradient: tensor}}"""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for ranks in (1, 2, 3):
        out = folder / f"{ranks}.safetensors"
        succeed(ROOT / "tests/helpers/layouts.py", pipeline / "base", out, ranks=ranks)
        found[ranks] = load_file(out)
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layout_gives_the_same_loss_and_gradient(results, objective):
    loss = results[1][f"{objective}/plain/1/False/loss"]  # one process, one unpacked response at a time
    gradient = results[1][f"{objective}/plain/1/False/gradient"]
    assert loss.abs() > 1e-3 and gradient.abs().max() > 1e-4, "a step without loss would prove nothing"
    for ranks, found in results.items():
        for packing, budget, shuffled in layouts_of(objective):
            key, where = f"{objective}/{packing}/{budget}/{shuffled}", f"{ranks} ranks"
            torch.testing.assert_close(found[f"{key}/loss"], loss, rtol=0, atol=1e-10, msg=f"{where} {key}")
            torch.testing.assert_close(found[f"{key}/gradient"], gradient, rtol=0, atol=1e-10, msg=f"{where} {key}")


def test_the_objectives_differ_from_each_other(results):
    """Equal numbers everywhere would also pass above if the settings did nothing."""
    losses = [results[1][f"{name}/plain/1/False/loss"].item() for name in OBJECTIVES]
    assert len({round(loss, 6) for loss in losses}) == len(OBJECTIVES)
