"""maskpro and proxsparse through the shared loop: resume, no graph, nothing left behind."""

import pytest
import torch

import tiny_models
from nmprune import masks
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.stream import DecoderModel, select
from nmprune.train.loop import Text, learn
from nmprune.train.masked_linear import targets_of
from nmprune.train.settings import TrainRecipe

PATTERN = Pattern(2, 4)
SETTINGS = TrainRecipe(steps=6, batch_size=2, eval_every=3, guard=False)
METHODS = {
    "maskpro": {"flip_share": 0.2, "lr": 20.0},
    "proxsparse": {"lr": 0.01, "anchor": 0.1},
}
TOKENS = torch.randint(0, 96, (10, 12), generator=torch.Generator().manual_seed(0))
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def model():
    return tiny_models.build("llama").eval()


def learner(model, name, snapshot=None, **settings):
    decoder = DecoderModel.from_model(model)
    layers = list(decoder.layers)
    chosen = [[(linear, PATTERN) for linear in one.prune] for one in select(decoder, PATTERN)]
    targets = targets_of(layers, chosen)
    generator = torch.Generator().manual_seed(1)
    priors = {
        t.name: masks.pack(masks.from_scores(torch.randn(t.shape, generator=generator), PATTERN)) for t in targets
    }
    method = create(name, {**METHODS[name], **settings})
    return learn(model, layers, targets, method, priors, Text(TOKENS[:8], TOKENS[8:]), SETTINGS, 0, snapshot)


def finish(steps):
    """All that is yielded, and what is returned."""
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as stop:
            return found, stop.value


@each_method
def test_going_on_from_a_snapshot_is_the_uninterrupted_run(model, name):
    whole, learned = finish(learner(model, name))
    half = learner(model, name)
    for step in half:
        if step.step == 4:
            snapshot = step.snapshot()
            half.close()
            break
    rest, resumed = finish(learner(model, name, snapshot))
    assert [one.values for one in rest] == [one.values for one in whole[5:]]
    assert all(torch.equal(resumed.bits[key], learned.bits[key]) for key in learned.bits)
    assert resumed.best == learned.best and resumed.last == learned.last


@each_method
def test_the_model_is_as_it_was(model, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, learned = finish(learner(model, name))
    assert learned.last.flips > 0
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_proxsparse_pulls_groups_to_two_non_zeros(model):
    """With the loss out of the way by a great lambda: after some steps nearly every group is 2:4."""
    steps = learner(model, "proxsparse", lambda_rel=1e4)
    for step in steps:
        if step.step == 6:
            trained = {key: value for key, value in step.snapshot().items() if key.endswith("proj:weight")}
    nonzeros = torch.cat([(value.unflatten(-1, (-1, 4)) != 0).sum(-1).flatten() for value in trained.values()])
    assert len(trained) == 14 and (nonzeros <= 2).float().mean() > 0.95


def test_maskpro_keeps_no_graph(model):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.shape) or value, lambda value: value
    ):
        finish(learner(model, "maskpro"))
    assert not saved
