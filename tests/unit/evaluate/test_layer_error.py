import pytest
import torch

import tiny_models
from nmprune.evaluate.layer_error import layer_errors
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, select


def relative(x, change, dense):
    return ((x @ change.T).square().sum() / (x @ dense.T).square().sum()).item()


@pytest.fixture
def folders(tmp_path):
    """A dense model, and one in which every second weight of every linear is zero."""
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "dense")
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in layer.modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path, model, kept


def test_it_is_the_error_on_the_pruned_models_own_inputs(folders):
    place, model, kept = folders
    pruned = DecoderModel.open(place / "pruned", allow_sparse=True)
    dense = DecoderModel.open(place / "dense")
    windows = torch.randint(0, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    selections = select(pruned, Pattern(2, 4), ["*.o_proj"])
    found = layer_errors(dense.checkpoint, pruned, selections, windows)
    assert set(found) == {linear.name for one in selections for linear in one.prune}
    assert not any("o_proj" in name for name in found)
    seen = {}
    names = {module: name for name, module in model.named_modules()}

    def keep(module, args):
        seen[names[module]] = args[0].flatten(0, -2)

    for name in found:
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(windows)
    for name, error in found.items():
        base = kept[f"{name}.weight"]
        expected = relative(seen[name], model.get_parameter(f"{name}.weight") - base, base)
        assert error == pytest.approx(expected, rel=1e-4), name
        assert error > 0.1


def test_a_dense_model_has_none(folders):
    place, model, _ = folders
    dense = DecoderModel.open(place / "dense")
    windows = torch.randint(0, model.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(0))
    found = layer_errors(dense.checkpoint, dense, select(dense, Pattern(2, 4)), windows)
    assert set(found.values()) == {0.0}
