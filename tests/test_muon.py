"""Muon: fast orthogonalisation against its formula, and steps against PyTorch's."""
from types import SimpleNamespace

import pytest
import torch

from lorasae.beyond.muon import Muon, muon, naive_orthogonal, orthogonal

SHAPES = [(6, 20), (20, 6), (6, 20), (6, 6), (3, 40), (20, 20)]


def parameters(shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("steps", [1, 5])
def test_matrices_of_one_shape_together_match_the_formula_one_by_one(steps):
    matrices = [parameter.detach() for parameter in parameters()]
    for matrix, found in zip(matrices, orthogonal(matrices, steps)):
        if matrix.shape[0] <= matrix.shape[1]:
            expected = naive_orthogonal(matrix, steps)
        else:
            expected = naive_orthogonal(matrix.T, steps).T
        torch.testing.assert_close(found, expected)
    found, = orthogonal([torch.zeros(3, 5)], steps)     # A's first gradient: B is still 0
    assert not found.any()


def take_steps(seeds, optimisers, *weights):
    """One step per seed. The seed gives every list of weights the same gradients."""
    for seed in seeds:
        for own in weights:
            torch.manual_seed(100 + seed)
            for weight in own:
                weight.grad = torch.randn_like(weight)
        for optimiser in optimisers:
            optimiser.step()


def theirs(weights, **options):
    return torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **options)


def trained(made_by, weight_decay=0.0, state=None):
    """Matrices after a few steps, and their optimiser."""
    weights = parameters()
    optimiser = made_by(weights, lr=0.01, weight_decay=weight_decay)
    if state is not None:
        optimiser.load_state_dict(state)
    take_steps(range(4), [optimiser], weights)
    return weights, optimiser


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_and_state_match_pytorchs_up_to_bf16_rounding(weight_decay):
    ours, our_optimiser = trained(Muon, weight_decay)
    pytorchs, other_optimiser = trained(theirs, weight_decay)
    for found, expected, before in zip(ours, pytorchs, parameters()):
        assert (found - expected).norm() < 0.02 * (expected - before).norm()

    for mine, other in zip(our_optimiser.state_dict()["state"].values(),
                           other_optimiser.state_dict()["state"].values(), strict=True):
        assert mine.keys() == other.keys()
        torch.testing.assert_close(mine["momentum_buffer"], other["momentum_buffer"])
    continued, _ = trained(Muon, weight_decay, other_optimiser.state_dict())
    assert not any(map(torch.equal, continued, ours))                   # it uses the momentum


def test_a_weight_without_a_gradient_stays_unchanged():
    still, moving = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    moving.grad = torch.randn(3, 4)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(3, 4)) and not torch.equal(moving, torch.ones(3, 4))


def test_vectors_and_scalars_go_to_adamw_and_matrices_to_muon():
    """Both are in one optimiser, whose rates a run can set and whose state it can save and load."""
    how = SimpleNamespace(lr=0.01, weight_decay=0.1)
    apart, together, resumed = (parameters([(6, 20), (6,), ()]) for _ in range(3))
    of_vectors = torch.optim.AdamW(apart[1:], **vars(how))
    take_steps(range(4), [Muon(apart[:1], **vars(how)), of_vectors], apart)

    optimiser = muon([{"params": together, "rate": 0.3}], how)
    assert [group["rate"] for group in optimiser.param_groups] == [0.3, 0.3]
    take_steps(range(2), [optimiser], together)
    state = optimiser.state_dict()
    for parameter, value in zip(resumed, together):
        parameter.data.copy_(value.data)
    again = muon([{"params": resumed}], how)
    again.load_state_dict(state)
    take_steps(range(2, 4), [again], resumed)
    torch.testing.assert_close(resumed, apart)
