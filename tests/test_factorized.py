"""Densities in fewer passes are torch's own densities."""

import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import hessian

from ppvae.factorized import log_prob


def cases():
    torch.manual_seed(0)
    loc, scale = torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.1
    z = torch.randn(5, 4, 3).double()
    one, none = torch.ones(3).double(), torch.zeros(3).double()
    number = torch.tensor(0.3).double(), torch.tensor(0.7).double()
    bits = (torch.rand(5, 4, 3) < 0.5).double()
    return {
        "normal, no event": (dist.Normal(loc, scale), z),
        "normal": (dist.Normal(loc, scale).to_event(1), z),
        "expanded over draws": (dist.Normal(loc, scale).to_event(1).expand((5, 4)), z),
        "one scale for all": (dist.Normal(loc, 0.7).to_event(1), z),
        "expanded along the event": (dist.Normal(*number).expand((4, 3)).to_event(1), z),
        "the prior": (dist.Normal(none, one).to_event(1).expand((5, 4)), z),
        "two event dimensions": (dist.Normal(loc, scale).to_event(2), z),
        "nested": (dist.Normal(loc, scale).to_event(1).to_event(1), z),
        "one value, many normals": (dist.Normal(z, 0.5).to_event(1), loc),
        "one number, many normals": (dist.Normal(z, 0.5).to_event(1), torch.ones(1).double()),
        "torch's own": (
            torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1),
            z,
        ),
        "a number": (dist.Normal(0.0, 2.0), torch.tensor(1.0)),
        "Bernoulli": (dist.Bernoulli(logits=z).to_event(1), bits),
        "Bernoulli of probabilities": (dist.Bernoulli(loc.sigmoid()).to_event(1), bits),
        "Bernoulli, expanded": (dist.Bernoulli(logits=none).expand((4, 3)).to_event(1), bits),
        "Bernoulli, no event": (dist.Bernoulli(logits=z), bits),
        "another one": (dist.Laplace(loc, scale).to_event(1), z),
    }


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("name", list(cases()))
def test_equals_torch(name, grad):
    fn, value = cases()[name]
    before = value.clone()
    with torch.set_grad_enabled(grad):
        found = log_prob(fn, value)
    torch.testing.assert_close(found, fn.log_prob(value), rtol=1e-12, atol=1e-12)
    assert torch.equal(value, before)


def test_a_class_of_ones_own_keeps_its_density():
    class Halved(dist.Normal):
        def log_prob(self, value):
            return 0.5 * super().log_prob(value)

    fn = Halved(torch.zeros(4, 3), 1.0)
    z = torch.randn(5, 4, 3)
    assert torch.equal(log_prob(fn, z), 0.5 * dist.Normal(0.0, 1.0).log_prob(z))
    assert torch.equal(log_prob(fn.to_event(1), z), fn.to_event(1).log_prob(z))


def test_derivatives_are_those_of_the_density():
    """In value, mean and scale, the second ones too, and at the mean itself."""

    def of(density, z, loc, scale):
        return density(dist.Normal(loc, scale).to_event(1), z).sum()

    at = (torch.randn(2, 4).double(), torch.randn(4).double(), torch.rand(4).double() + 0.2)
    at[0][0] = at[1]
    ours = hessian(lambda *a: of(log_prob, *a), at)
    theirs = hessian(lambda *a: of(lambda fn, z: fn.log_prob(z), *a), at)
    for row, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, other)


def test_values_far_out_and_scales_far_apart():
    """What torch gives: no finite number where it has none, and no loss of digits."""
    loc = torch.tensor([1e4, -1e4, 0.0])
    fn = dist.Normal(loc, torch.tensor([1e-3, 1e3, 1e-20])).to_event(1)
    z = loc + torch.tensor([1e-3, 1e3, 1e-20])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(log_prob(fn, z), fn.log_prob(z))
            assert log_prob(fn, z + 1e30) == -torch.inf
            assert log_prob(fn, z * torch.nan).isnan()
