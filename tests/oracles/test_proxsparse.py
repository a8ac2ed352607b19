"""The proximal operator against the authors' code (../shared/oracles, section C)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nmprune import masks
from nmprune.methods.proxsparse import prox, regulariser
from nmprune.pattern import Pattern
from shared_data import shared


@pytest.fixture(scope="module")
def groups() -> dict[str, torch.Tensor]:
    return load_file(shared("oracles/C_prox.safetensors"))


def objective(w, groups):
    w = w.double()
    return (w - groups["y"]).square().sum(-1) / 2 + groups["lambda_"] * regulariser(w).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_prox_is_theirs_on_groups_with_one_answer(groups, dtype):
    ours = prox(groups["y"].to(dtype), groups["lambda_"].to(dtype)[:, None]).double()
    difference = (ours - groups["prox_fp64"]).abs().amax(-1) / groups["y"].abs().amax(-1).clamp(min=1e-300)
    unique = groups["unique"].bool()
    assert unique.sum() == 1793
    assert difference[unique].max() < 1e-4


def test_prox_is_nowhere_worse_than_theirs(groups):
    ours = objective(prox(groups["y"], groups["lambda_"][:, None]), groups)
    slack = 1e-9 * groups["y"].square().sum(-1) / 2
    assert (ours <= groups["objective_prox_fp64"] + slack).all()
    is_global = groups["peer_is_global"].bool()
    assert (ours[is_global] <= groups["objective_bruteforce_fp64"][is_global] + slack[is_global]).all()


def test_repeated_prox_of_a_matrix():
    matrix = load_file(shared("oracles/C_prox_matrix.safetensors"))
    torch.testing.assert_close(regulariser(matrix["W0"]).flatten(), matrix["reg_W0"].flatten())
    w = matrix["W0"]
    for times in range(1, 101):
        w = prox(w, 2.0)
        if f"W_after_{times}" in matrix:
            torch.testing.assert_close(w, matrix[f"W_after_{times}"], rtol=1e-4, atol=1e-6)
    magnitude = matrix["explicit_magnitude_2of4"]
    assert torch.equal(masks.from_scores(w.abs(), Pattern(2, 4)), magnitude != 0)
