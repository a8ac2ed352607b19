import torch

from nmprune.methods import adamw


def test_it_is_torchs():
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(5, 3, generator=draw)
    theirs = value.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=adamw.BETAS, eps=adamw.EPSILON, weight_decay=0.3)
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for count in range(1, 6):
        gradient = torch.randn(5, 3, generator=draw)
        theirs.grad = gradient.clone()
        optimizer.step()
        adamw.step(value, gradient, first, second, count, 0.1, 0.3)
    torch.testing.assert_close(value, theirs.detach())


def test_tiny_gradients_move_as_far_as_large_ones():
    moved = []
    for scale in (1.0, 1e-9):
        value, first, second = torch.zeros(3), torch.zeros(3), torch.zeros(3)
        adamw.step(value, scale * torch.tensor([1.0, -2.0, 0.0]), first, second, 1, 0.1)
        moved.append(value)
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0], torch.tensor([-0.1, 0.1, 0.0]))
