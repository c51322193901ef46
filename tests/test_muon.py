"""Muon: its fast product against its formula, its steps against PyTorch's."""
import pytest
import torch

from lorasae.beyond.muon import Muon, naive_orthogonal, orthogonal

SHAPES = [(6, 20), (20, 6), (6, 20), (6, 6), (3, 40), (20, 20)]


def matrices(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape) for shape in SHAPES]


@pytest.mark.parametrize("steps", [1, 5])
def test_matrices_of_one_shape_together_are_the_formula_one_by_one(steps):
    for matrix, found in zip(matrices(), orthogonal(matrices(), steps)):
        if matrix.shape[0] <= matrix.shape[1]:
            expected = naive_orthogonal(matrix, steps)
        else:
            expected = naive_orthogonal(matrix.T, steps).T
        torch.testing.assert_close(found, expected)


def test_the_formula_leaves_the_directions_and_evens_out_their_sizes():
    torch.manual_seed(0)
    P, Q = torch.linalg.qr(torch.randn(8, 8)).Q, torch.linalg.qr(torch.randn(32, 8)).Q
    sizes = torch.logspace(0, -2, 8)
    found = P.T @ naive_orthogonal(P @ torch.diag(sizes) @ Q.T) @ Q             # diagonal, as P and Q are unchanged
    torch.testing.assert_close(found, torch.diag(found.diagonal()), atol=1e-5, rtol=0)
    assert 0.6 < found.diagonal().min() and found.diagonal().max() < 1.3


def test_no_gradient_moves_nothing():
    """As that of A at the first step, while B is 0."""
    found, = orthogonal([torch.zeros(3, 5)])
    assert torch.equal(found, torch.zeros(3, 5))


def theirs(weights, **options):
    return torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **options)


def weights_of(made_by, weight_decay=0.0, state=None):
    """Matrices after some steps on gradients of a fixed seed, and the optimiser."""
    weights = [torch.nn.Parameter(matrix) for matrix in matrices()]
    optimiser = made_by(weights, lr=0.01, weight_decay=weight_decay)
    if state is not None:
        optimiser.load_state_dict(state)
    for step in range(4):
        for weight, gradient in zip(weights, matrices(seed=step + 1)):
            weight.grad = gradient
        optimiser.step()
    return [weight.detach() for weight in weights], optimiser


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_its_steps_are_those_of_pytorch_to_the_rounding_of_bf16(weight_decay):
    ours, _ = weights_of(Muon, weight_decay)
    pytorchs, _ = weights_of(theirs, weight_decay)
    for found, expected, before in zip(ours, pytorchs, matrices()):
        assert (found - expected).norm() < 0.02 * (expected - before).norm()


def test_its_state_is_that_of_pytorch():
    _, other_optimiser = weights_of(theirs)
    _, ours = weights_of(Muon)
    for mine, other in zip(ours.state_dict()["state"].values(), other_optimiser.state_dict()["state"].values()):
        assert mine.keys() == other.keys()
        torch.testing.assert_close(mine["momentum_buffer"], other["momentum_buffer"])

    continued, _ = weights_of(Muon, state=other_optimiser.state_dict())
    anew, _ = weights_of(Muon)
    assert not any(torch.equal(a, b) for a, b in zip(continued, anew))      # it went on with the momentum


def test_a_group_of_its_own_has_the_same_bits_and_its_own_rate():
    """As students side by side have."""
    alone, _ = weights_of(Muon)
    first, second = ([torch.nn.Parameter(matrix) for matrix in matrices()] for _ in range(2))
    optimiser = Muon([{"params": first}, {"params": second, "lr": 0.02}], lr=0.01)
    for step in range(4):
        for weights in (first, second):
            for weight, gradient in zip(weights, matrices(seed=step + 1)):
                weight.grad = gradient
        optimiser.step()
    assert all(torch.equal(found, expected) for found, expected in zip(first, alone))
    assert not any(torch.equal(found, expected) for found, expected in zip(second, alone))


def test_a_weight_without_gradient_is_left_alone():
    still, moving = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    moving.grad = torch.randn(3, 4)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(3, 4)) and not torch.equal(moving, torch.ones(3, 4))
