"""The truncated normal against SciPy's, far into the tail."""

import pytest
import torch
from scipy import stats

from ppvae.distributions import TruncatedNormal

CASES = [(0.0, 1.0), (2.0, 0.5), (-3.0, 1.0), (-30.0, 1.0), (-8.0, 0.2), (50.0, 3.0)]


def both(loc, scale):
    ours = TruncatedNormal(torch.tensor(loc).double(), torch.tensor(scale).double())
    return ours, stats.truncnorm(-loc / scale, float("inf"), loc=loc, scale=scale)


@pytest.mark.parametrize(("loc", "scale"), CASES)
def test_it_is_scipys_truncated_normal(loc, scale):
    ours, theirs = both(loc, scale)
    z = torch.as_tensor(theirs.ppf([1e-6, 0.01, 0.3, 0.5, 0.9, 0.999]))
    torch.testing.assert_close(ours.log_prob(z), torch.as_tensor(theirs.logpdf(z)))
    torch.testing.assert_close(ours.cdf(z), torch.as_tensor(theirs.cdf(z)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(float(ours.mean), float(theirs.mean()), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(float(ours.variance), float(theirs.var()), rtol=1e-5, atol=0.0)
    # H = −E[log q] by integration over the levels u.
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    entropy = -ours.log_prob(ours.icdf(u)).mean()
    torch.testing.assert_close(ours.entropy(), entropy, rtol=0, atol=1e-4)
    u = torch.linspace(0.001, 0.999, 99).double()
    torch.testing.assert_close(ours.cdf(ours.icdf(u)), u, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("loc", "scale"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_distribution(loc, scale, dtype):
    q = TruncatedNormal(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype))
    draws = q.rsample((20_000,)).double().numpy()
    _, theirs = both(loc, scale)
    assert draws.min() >= 0
    assert stats.kstest(draws, theirs.cdf).pvalue > 1e-5


@pytest.mark.parametrize("loc", [-20.0, -3.0, 0.5, 4.0])
def test_draws_carry_the_gradient_of_their_quantile(loc):
    """Reparameterisation: at a fixed level u, dz/dλ = −(∂F/∂λ) / f."""
    loc = torch.tensor(loc).double().requires_grad_(True)
    scale = torch.tensor(1.3).double().requires_grad_(True)
    z = TruncatedNormal(loc, scale).icdf(torch.tensor(0.37).double())
    through = torch.autograd.grad(z, (loc, scale))
    q = TruncatedNormal(loc, scale)
    level = torch.autograd.grad(q.cdf(z.detach()), (loc, scale))
    density = q.log_prob(z.detach()).exp().detach()
    for ours, implicit in zip(through, level, strict=True):
        torch.testing.assert_close(ours, -implicit / density, rtol=1e-6, atol=1e-10)


def test_values_and_parameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="scale"):
        TruncatedNormal(0.0, -1.0)
    with pytest.raises(ValueError, match="support"):
        TruncatedNormal(0.0, 1.0).log_prob(torch.tensor(-0.1))


def test_it_expands_and_makes_an_event():
    q = TruncatedNormal(torch.zeros(3), torch.ones(3)).expand([5, 3]).to_event(1)
    assert q.batch_shape == (5,)
    assert q.rsample((2,)).shape == (2, 5, 3)
    assert q.log_prob(q.rsample()).shape == (5,)
