from __future__ import annotations

import pytest

import tiny_models
from nmprune.checkpoint import MaskFile, TensorMask
from nmprune.masks import from_scores
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel
from nmprune.train.parts import masked_parameters, trained_parameters, unmasked_tensors

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(params=["llama", "llama_tied"])
def model(request, tmp_path) -> DecoderModel:
    return DecoderModel.open(tiny_models.save(request.param, tmp_path / "m"))


def masks(model: DecoderModel) -> MaskFile:
    assert model.checkpoint is not None
    mask = from_scores(model.checkpoint.read(Q).abs(), Pattern(2, 4))
    return MaskFile({Q: TensorMask.from_mask(mask, Pattern(2, 4))}, "magnitude", "m", "", "")


def test_what_is_trained(model):
    file = masks(model)
    masked = masked_parameters(model.pieces, file)
    assert masked == {Q}

    def trained(*also):
        return trained_parameters(model.model, "model.layers", masked, also)

    assert set(trained()) == {Q}
    norms = set(trained("norms")) - {Q}
    assert norms and all("norm" in name for name in norms)
    tied = "lm_head.weight" not in dict(model.model.named_parameters())
    embeddings = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(trained("embeddings")) == {Q, *embeddings}, "no linear of a layer without a mask"


def test_the_tensors_that_may_change_are_those_of_the_disk(model):
    file = masks(model)
    trained = trained_parameters(model.model, "model.layers", {Q}, ("embeddings",))
    found = unmasked_tensors(model.model, model.pieces, trained, file)
    assert model.checkpoint is not None
    assert found == {"model.embed_tokens.weight", "lm_head.weight"} & set(model.checkpoint.names())
    assert unmasked_tensors(model.model, model.pieces, {Q: model.model.get_parameter(Q)}, file) == set()
