"""Densities in fewer passes are torch's own densities."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import hessian

import ppvae
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


@pytest.mark.parametrize("size", [784, 12_288, 196_608])
def test_many_pixels_lose_no_more_digits_than_torch(size):
    """float32 against float64: what a density of an image rounds does not hang on gradients."""
    torch.manual_seed(0)
    loc, scale = torch.rand(2, size), torch.full((2, size), 0.1)
    value = torch.rand(3, 2, size)
    fn = dist.Normal(loc, scale).to_event(1)
    exact = dist.Normal(loc.double(), scale.double()).to_event(1).log_prob(value.double())
    own = (fn.log_prob(value) - exact).abs().max()
    with torch.no_grad():
        found = log_prob(fn, value)
    assert (found - exact).abs().max() <= 4 * own + 1e-6 * exact.abs().max()


def test_each_element_of_an_expanded_leaf_has_its_own_derivative():
    value = torch.arange(3.0)
    for shape in ((3,), (2, 3)):
        leaf = torch.zeros(1).expand(shape).detach().requires_grad_()
        fn = dist.Normal(leaf, 1.0).to_event(1)
        (found,) = torch.autograd.grad(log_prob(fn, value).sum(), leaf)
        torch.testing.assert_close(found, value.expand(shape))
        scale = torch.ones(1).expand(shape).detach().requires_grad_()
        fn = dist.Normal(0.0, scale).to_event(1)
        (found,) = torch.autograd.grad(log_prob(fn, value).sum(), scale)
        torch.testing.assert_close(found, (value**2 - 1).expand(shape))


def test_an_expanded_latent_has_a_gradient_for_each_draw():
    """x | z ~ N(z, 1), z ~ N(0, 1): the gradient of log p in z is x − 2 z."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.arange(6.0).reshape(3, 2)
    z = torch.zeros(1, 1, 1).expand(4, 3, 2).requires_grad_()
    (found,) = torch.autograd.grad(ppvae.log_joint(model, x, z).sum(), z)
    torch.testing.assert_close(found, x.expand(4, 3, 2))


# What torch itself imports for them.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_transforms_of_functions(grad):
    """torch.func sees what torch's own density gives it, of expanded parameters too."""
    loc = torch.zeros(1).expand(3).detach()
    z = torch.tensor([1.0, 2.0, 3.0])

    def of(density):
        def at(loc, scale):
            # Checks of values are beyond vmap in older versions.
            return density(dist.Normal(loc, scale, validate_args=False).to_event(1), z)

        return at

    ours, theirs = of(log_prob), of(lambda fn, z: fn.log_prob(z))
    scales = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    tangent = torch.tensor([0.0, 1.0, 0.0])
    with torch.set_grad_enabled(grad):
        for act in (
            lambda f: torch.func.grad(f)(loc, torch.ones(3)),
            lambda f: torch.func.vmap(f, (None, 0))(loc, scales),
            lambda f: torch.func.jvp(lambda m: f(m, torch.ones(3)), (loc.clone(),), (tangent,))[1],
            lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(z, torch.ones(3)),
        ):
            torch.testing.assert_close(act(ours), act(theirs))
