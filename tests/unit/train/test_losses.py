import pytest
import torch

from nmprune.train.losses import kl_loss, lm_loss, teacher

B, T, V = 3, 5, 11


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, V, generator=generator) * 2, torch.randn(B, T, V, generator=generator) * 2


def test_lm_loss_is_the_mean_next_token_cross_entropy_of_each_sequence(logits):
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    log_p = logits[0].double().log_softmax(-1)
    plain = [-sum(log_p[b, t, ids[b, t + 1]] for t in range(T - 1)) / (T - 1) for b in range(B)]
    torch.testing.assert_close(lm_loss(logits[0], ids).double(), torch.stack(plain), rtol=1e-5, atol=1e-6)


def test_kl_loss_is_the_divergence_from_the_dense_model(logits):
    dense, model = (one.double().log_softmax(-1) for one in logits)
    plain = (dense.exp() * (dense - model)).sum(-1).mean(-1)
    torch.testing.assert_close(kl_loss(logits[1], teacher(logits[0])).double(), plain, rtol=1e-5, atol=1e-6)
    assert kl_loss(logits[0], teacher(logits[0])).abs().max() < 1e-6


@pytest.mark.parametrize("entries", [1, 2 * V, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_kl_loss_is_that_of_plain_operations_however_many_tokens_go_together(
    logits, entries, dtype, monkeypatch
):
    monkeypatch.setattr("nmprune.train.losses._ON_CPU", entries)
    scale = torch.tensor([1.0, -2.0, 0.5])
    model = logits[1].to(dtype, copy=True).requires_grad_()
    (kl_loss(model, teacher(logits[0])) * scale).sum().backward()
    plain = logits[1].to(dtype).double().requires_grad_()
    dense = logits[0].double().log_softmax(-1)
    ((dense.exp() * (dense - plain.log_softmax(-1))).sum(-1).mean(-1) * scale).sum().backward()
    within = 1e-6 if dtype == torch.float32 else 4e-3
    assert model.grad.dtype == dtype
    torch.testing.assert_close(model.grad.double(), plain.grad, rtol=2 * within, atol=within)


def test_top_k_counts_the_rest_as_one(logits):
    dense, model = (one.double().softmax(-1) for one in logits)
    best = dense.topk(4).indices
    p, q = dense.gather(-1, best), model.gather(-1, best)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    plain = ((p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()).mean(-1)
    found = kl_loss(logits[1], teacher(logits[0], top_k=4)).double()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert (found < kl_loss(logits[1], teacher(logits[0])).double()).all()


def test_a_top_k_of_all_tokens_is_no_top_k(logits):
    assert teacher(logits[0], top_k=V).tokens is None
    assert teacher(logits[0], top_k=3).log_p.shape == (B, T, 3)


def test_gradients_reach_the_model_and_not_the_teacher(logits):
    dense, model = (one.clone().requires_grad_() for one in logits)
    kl_loss(model, teacher(dense, 4)).sum().backward()
    assert model.grad is not None and model.grad.abs().sum() > 0
    assert dense.grad is None


def test_a_certain_teacher_and_a_wrong_model_are_finite():
    dense = torch.tensor([[[100.0, 0.0, 0.0, 0.0]]])
    loss = kl_loss(torch.tensor([[[0.0, 100.0, 0.0, 0.0]]]), teacher(dense, 2))
    assert torch.isfinite(loss).all() and loss > 50
