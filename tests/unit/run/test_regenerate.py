"""The masks of a hyperprune run again, from its last network alone."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import tiny_runs
from nmprune import masks
from nmprune.checkpoint import Checkpoint, read_masks
from nmprune.errors import InputError
from nmprune.methods.hyperprune import HyperPrune
from nmprune.pattern import Pattern
from nmprune.run import Recipe, RunFolder, prune_run
from nmprune.run.apply import apply_masks
from nmprune.run.regenerate import regenerate
from nmprune.train.finetune_settings import FinetuneRecipe
from runs import hashes

SMALL = {
    "hidden": 8,
    "layer_width": 3,
    "component_width": 3,
    "steps": 6,
    "check_every": 3,
    "cache_size": 10,
    "descend": 0,
}
FAR = {
    **SMALL,
    "prior": "wanda",
    "guard": False,
    "keep_best": False,
    "steps": 12,
    "residual_lr": 0.2,
}  # far from the prior
ALONE = {**SMALL, "residual": False, "network_every": 1, "network_share": 1.0, "guard": False}


def learned(place, name="llama", settings=SMALL, **recipe):
    """A finished run."""
    base = tiny_runs.model(place / "model", name)
    raw = {
        "model": str(base),
        "method": {"name": "hyperprune", **settings},
        "calibration": {"source": "builtin", "n_sequences": 4, "seq_len": 16, "n_held_out": 1},
        **recipe,
    }
    prune_run(Recipe.from_dict(raw), place / "run")
    return base, place / "run"


def test_a_network_that_learned_one_layer_makes_its_masks_again(tmp_path):
    """No later layer, no free scores, no choice among steps: nothing is forgotten, every group agrees."""
    settings = {**ALONE, "keep_best": False, "prior": "wanda", "features": "activations"}
    base = tiny_runs.model(tmp_path / "model", num_hidden_layers=1)
    raw = {"model": str(base), "method": {"name": "hyperprune", **settings, "distil": 0}}
    raw["calibration"] = {"source": "builtin", "n_sequences": 4, "seq_len": 16, "n_held_out": 1}
    prune_run(Recipe.from_dict(raw), tmp_path / "run")
    found, _ = regenerate(tmp_path / "run")
    assert found.agreement == 1.0 and {one.agreement for one in found.linears} == {1.0}
    assert found.layers[0].network_loss == found.layers[0].run_loss


def test_what_is_compared(tmp_path):
    _, run = learned(tmp_path, settings=FAR)
    before = hashes(run)
    found, file = regenerate(run)
    assert json.loads(file.read_text()) == json.loads(json.dumps(dataclasses.asdict(found)))
    kept, made = read_masks(run / "masks.safetensors"), read_masks(run / "regenerated.safetensors")
    assert made.fingerprint == kept.fingerprint and made.method == "hyperprune, regenerated"
    made.check()
    assert [one.name for one in found.linears] == [one["name"] for one in results(run)["linears"]]
    for one in found.linears:
        tensor = f"{one.name}.weight"
        same = (kept.mask(tensor) == made.mask(tensor)).unflatten(1, (-1, 4)).all(-1)
        assert one.groups == same.numel() and one.agreement == pytest.approx(masks.density(same))
        assert one.prior_run is not None and one.prior_network is not None
        flips = next(note["notes"]["flips"] for note in results(run)["linears"] if note["name"] == one.name)
        assert one.prior_run == pytest.approx(1 - flips)
    weights = [one.groups for one in found.linears]
    mean = sum(one.agreement * n for one, n in zip(found.linears, weights, strict=True)) / sum(weights)
    assert 0 < found.agreement < 1 and found.agreement == pytest.approx(mean)
    after = {name: value for name, value in hashes(run).items() if "regenerated" not in name}
    assert after == before, "the run itself does not change"
    assert regenerate(run)[0].linears == found.linears


def results(run):
    return json.loads((run / "results.json").read_text())


def test_it_walks_where_the_run_walked(tmp_path):
    """Held-out losses of the run's masks are those that the run itself saw in every layer, moved weights before it included."""
    _, run = learned(tmp_path, settings=FAR, reconstruct="true")
    assert results(run)["updates_weights"]
    found, _ = regenerate(run)
    for one, then in zip(found.layers, results(run)["learned_layers"], strict=True):
        assert one.run_loss == pytest.approx(then["loss"], rel=1e-5)
        assert one.prior_loss == pytest.approx(then["prior_loss"], rel=1e-5)
        assert one.accepted == then["accepted"] and one.network_loss > 0


def test_the_masks_can_be_applied(tmp_path):
    base, run = learned(tmp_path)
    regenerate(run)
    apply_masks(run / "regenerated.safetensors", str(base), tmp_path / "applied")
    weight = Checkpoint.open(tmp_path / "applied").read("model.layers.1.mlp.up_proj.weight")
    assert masks.n_wrong_groups(weight != 0, Pattern(2, 4)) == 0


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_families(tmp_path, name):
    _, run = learned(tmp_path, name, stream={"min_expert_tokens": 24})
    found, _ = regenerate(run)
    n_linears = len(results(run)["linears"])
    assert len(found.linears) + len(found.left_out) == n_linears
    assert bool(found.left_out) == (name == "mixtral")
    kept, made = read_masks(run / "masks.safetensors"), read_masks(run / "regenerated.safetensors")
    made.check()
    if found.left_out:
        tensor, _, expert = found.left_out[0].rpartition(".")
        entry = found.left_out[0] + ".weight" if found.left_out[0] + ".weight" in kept.masks else tensor
        pick = ... if entry.endswith(".weight") else int(expert)
        assert torch.equal(made.mask(entry)[pick], kept.mask(entry)[pick])


def test_reordered_channels_and_mixed_patterns(tmp_path):
    for name, settings in (
        ("permuted", {"permute": "all"}),
        ("mixed", {"allocate": {"patterns": ["1:4", "2:4"], "density": "0.4"}}),
    ):
        (tmp_path / name).mkdir()
        _, run = learned(tmp_path / name, settings=FAR, **settings)
        found, _ = regenerate(run)
        for one, then in zip(found.layers, results(run)["learned_layers"], strict=True):
            assert one.prior_loss == pytest.approx(then["prior_loss"], rel=1e-5), name


def test_what_cannot_be_regenerated(tmp_path):
    base, run = learned(tmp_path)
    wanda = tiny_runs.finished(base, tmp_path / "wanda")
    with pytest.raises(InputError, match="is a run of wanda: only hyperprune has one network"):
        regenerate(wanda)
    tuned = dataclasses.replace(RunFolder(run).read_recipe(), finetune=FinetuneRecipe(parent="runs/parent"))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "recipe.yaml").write_text(tuned.to_yaml())
    (tmp_path / "tuned" / "results.json").write_bytes((run / "results.json").read_bytes())
    with pytest.raises(InputError, match=r"changes no mask.*the run that made them: runs/parent"):
        regenerate(tmp_path / "tuned")
    (run / "learned.safetensors").unlink()
    with pytest.raises(InputError, match="its last network is gone"):
        regenerate(run)
    (tmp_path / "free").mkdir()
    _, free = learned(tmp_path / "free", settings={**SMALL, "network": False})
    with pytest.raises(InputError, match="network=false"):
        regenerate(free)
    assert HyperPrune(**SMALL).network
