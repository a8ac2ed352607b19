"""What runs on a CUDA device equals what runs on the CPU, within what rounding may flip."""

from __future__ import annotations

import pytest
import torch

import tiny_models
from nmprune.stream import DecoderModel
from walks import layers_done, pruned, walk, wrong_share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device is seen; where there is one: make test-gpu"
    ),
]
MOST_GROUPS = 0.005


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral", "gpt_oss"])
def test_streamed_on_cuda_equals_cpu(name, method, tmp_path):
    folder, windows = tiny_models.save(name, tmp_path), tiny_models.windows()
    on_cpu, on_cuda = (
        pruned(walk(DecoderModel.open(folder, device=device), windows, method)) for device in ("cpu", "cuda")
    )
    assert wrong_share(on_cpu, on_cuda) <= MOST_GROUPS


def test_hidden_states_stay_on_the_cpu_while_layers_run_on_cuda(tmp_path):
    decoder = DecoderModel.open(tiny_models.save("llama", tmp_path), device="cuda")
    for budget in (1 << 30, 0):
        steps = walk(decoder, tiny_models.windows(), options={"hidden_budget": budget}, scratch=tmp_path)
        hidden = layers_done(steps)[0].hidden
        assert hidden is not None and hidden.device.type == "cpu"
    with decoder.layer(0) as layer:
        assert all(parameter.device.type == "cuda" for parameter in layer.parameters())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_bf16_on_cuda(method, tmp_path):
    folder, windows = tiny_models.save("llama", tmp_path, dtype=torch.bfloat16), tiny_models.windows()
    decoder = DecoderModel.open(folder, device="cuda")
    assert decoder.dtype == torch.bfloat16
    in_bf16 = pruned(walk(decoder, windows, method))
    again = pruned(walk(decoder, windows, method))
    assert wrong_share(in_bf16, again) == 0
    if method == "sparsegpt":
        assert {one.weight.dtype for one in in_bf16.values() if one.weight is not None} == {torch.bfloat16}
    # activations in bf16 against fp32: closely related masks, not equal ones
    in_fp32 = pruned(walk(DecoderModel.open(folder), windows, method))
    assert wrong_share(in_bf16, in_fp32) < 0.2
