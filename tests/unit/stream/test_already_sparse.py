from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune import masks
from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, refuse_sparse, select
from nmprune.stream.already_sparse import looks_sparse


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16", "16:32"])
def test_any_pattern_of_half_or_less_is_seen(pattern):
    dense = weight()
    mask = masks.from_scores(dense.abs(), Pattern.parse(pattern))
    assert looks_sparse(dense * mask)
    assert looks_sparse(torch.where(mask, dense.bfloat16(), 0))


def test_zeros_of_a_dense_checkpoint_are_no_sparsity():
    dense = weight()
    assert not looks_sparse(dense)
    # a 4-bit grid: 16 levels, some of them zero
    coarse = (dense / 0.8).round().clamp(-8, 7)
    assert 0.2 < (coarse == 0).float().mean() < 0.4
    assert not looks_sparse(coarse)
    # zeros at random
    scattered = dense * (torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    assert not looks_sparse(scattered)


def sparse_model(n_sparse: int):
    model = tiny_models.build("llama")
    for linear in select(DecoderModel.from_model(model), Pattern(2, 4))[0].prune[:n_sparse]:
        parameter = model.get_parameter(linear.tensor)
        with torch.no_grad():
            parameter.mul_(masks.from_scores(parameter.abs(), Pattern(2, 4)))
    return model


def test_a_model_with_half_its_linears_sparse_is_refused():
    with pytest.raises(InputError) as error:
        refuse_sparse(DecoderModel.from_model(sparse_model(4)), "someone/model")
    assert str(error.value).startswith("someone/model is sparse already: 4 of 7 linears of its first decoder layer")
    assert "--allow-sparse" in str(error.value)


def test_one_strange_linear_is_not_enough():
    refuse_sparse(DecoderModel.from_model(sparse_model(3)), "x")
    refuse_sparse(DecoderModel.from_model(tiny_models.build("mixtral")), "x")


def test_a_folder_is_looked_at_as_well(tmp_path):
    sparse_model(7).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="7 of 7 linears"):
        refuse_sparse(DecoderModel.open(tmp_path), "x")
