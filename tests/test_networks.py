"""Convolutional networks: what a pixel is, what the layout is, which sizes are refused."""

import copy

import numpy as np
import pytest
import torch
from scipy import special, stats

import ppvae
from ppvae.families import FullRankNormal
from ppvae.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
)
from ppvae.nn import MLP, ConvDecoder, ConvEncoder, LogCounts


def by_hand(image, weight, bias):
    """A convolution with windows of 4, stride 2 and a margin of one zero, pixel by pixel."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(bias), image.shape[1] // 2, image.shape[2] // 2))
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                window = padded[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
                out[c, i, j] = (window * weight[c]).sum() + bias[c]
    return out


def test_the_encoder_convolves_the_image_that_is_in_the_row():
    net = ConvEncoder((2, 4, 6), 3, channels=[5]).double()
    x = torch.randn(48).double()
    first, last = net.layers[0], net.dense.layers[0]
    image = by_hand(
        x.numpy().reshape(2, 4, 6), first.weight.detach().numpy(), first.bias.detach().numpy()
    )
    active = np.where(image > 0, image, np.expm1(image))
    expected = last.weight.detach().numpy() @ active.ravel() + last.bias.detach().numpy()
    np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-10)


def test_the_decoders_layer_is_the_transpose_of_the_encoders():
    """⟨conv(x), y⟩ = ⟨x, convᵀ(y)⟩, so that pixels lie where the encoder looks for them."""
    encoder = ConvEncoder((2, 4, 6), 1, channels=[5]).double()
    decoder = ConvDecoder(1, (2, 4, 6), channels=[5]).double()
    there, back = encoder.layers[0], decoder.layers[-1]
    with torch.no_grad():
        back.weight.copy_(there.weight)
        for layer in (there, back):
            layer.bias.zero_()
    x, y = torch.randn(2, 4, 6).double(), torch.randn(5, 2, 3).double()
    torch.testing.assert_close((there(x[None])[0] * y).sum(), (x * back(y[None])[0]).sum())


@pytest.mark.parametrize("leading", [(), (5,), (4, 5), (2, 3, 4), (0,)])
def test_leading_dimensions_are_so_many_calls(leading):
    encoder = ConvEncoder((2, 8, 4), 3, channels=[4, 5], hidden=[6]).double()
    decoder = ConvDecoder(3, (2, 8, 4), 2, channels=[5, 4], hidden=[6]).double()
    x, z = torch.randn(*leading, 64).double(), torch.randn(*leading, 3).double()
    assert encoder(x).shape == (*leading, 3)
    assert decoder(z).shape == (*leading, 128)
    for net, rows in ((encoder, x), (decoder, z)):
        flat = rows.reshape(-1, rows.shape[-1])
        one_by_one = [net(row) for row in flat]
        if one_by_one:
            torch.testing.assert_close(
                net(rows).flatten(0, -2) if leading else net(rows)[None], torch.stack(one_by_one)
            )


def blocks_of(decoder, z):
    """What the last convolution puts out: (rows, P, C, H, W)."""
    images = decoder.layers(decoder.dense(z).reshape(len(z), *decoder.start))
    return images.reshape(len(z), decoder.outputs_per_pixel, *decoder.image_shape).detach().numpy()


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian.network(), Categorical(3)], ids=repr)
def test_the_decoders_layout_is_the_likelihoods(likelihood):
    """Numbers of one pixel come from one pixel: read from the image before it is flattened."""
    shape = (2, 4, 4)
    model, _ = ppvae.pairs.vae(32, 3, [5], likelihood, image_shape=shape, channels=[4])
    model = model.double()
    z = torch.randn(6, 3).double()
    output = model.decoder(z)
    assert output.shape == (6, likelihood.num_outputs(32))
    blocks = blocks_of(model.decoder, z)
    x = torch.randint(0, 2, (6, *shape)).double()
    if isinstance(likelihood, Bernoulli):
        log_x = stats.bernoulli(special.expit(blocks[:, 0])).logpmf(x.numpy())
        mean = special.expit(blocks[:, 0])
    elif isinstance(likelihood, Gaussian):
        log_x = stats.norm(blocks[:, 0], np.exp(0.5 * blocks[:, 1])).logpdf(x.numpy())
        mean = blocks[:, 0]
    else:
        log_p = special.log_softmax(blocks, axis=1)
        log_x = np.where(x.numpy() == 0, log_p[:, 0], log_p[:, 1])
        mean = np.moveaxis(np.exp(log_p), 1, -1)
    ours = likelihood.distribution(output).log_prob(x.reshape(6, 32)).detach()
    np.testing.assert_allclose(ours, log_x.reshape(6, -1).sum(axis=1), rtol=1e-10)
    decoded = model.decode(z)
    np.testing.assert_allclose(decoded.reshape(mean.shape), mean, rtol=1e-10)


def test_sizes_on_the_way_are_those_of_the_representation():
    encoder = ConvEncoder((3, 16, 8), 7, channels=[4, 6, 8], hidden=[9])
    assert (
        repr(encoder)
        == "ConvEncoder(3 x 16 x 8 -> 4 x 8 x 4 -> 6 x 4 x 2 -> 8 x 2 x 1 -> 9 -> 7, ELU)"
    )
    x, shapes = torch.zeros(2, 3, 16, 8), []
    for layer in encoder.layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes[::2] == [(4, 8, 4), (6, 4, 2), (8, 2, 1)]
    decoder = ConvDecoder(
        7, (3, 16, 8), 2, channels=[8, 6, 4], hidden=[9], activation=torch.nn.Tanh
    )
    assert (
        repr(decoder)
        == "ConvDecoder(7 -> 9 -> 8 x 2 x 1 -> 6 x 4 x 2 -> 4 x 8 x 4 -> 6 x 16 x 8, Tanh)"
    )


def test_a_pair_of_images_has_the_networks_that_were_asked_for():
    model, guide = ppvae.pairs.vae(
        64,
        3,
        [20],
        Gaussian.network(),
        FullRankNormal(3),
        image_shape=(1, 8, 8),
        channels=[4, 6],
        activation=torch.nn.Tanh,
    )
    assert (
        repr(model.decoder) == "ConvDecoder(3 -> 20 -> 6 x 2 x 2 -> 4 x 4 x 4 -> 2 x 8 x 8, Tanh)"
    )
    assert (
        repr(guide.encoder) == "ConvEncoder(1 x 8 x 8 -> 4 x 4 x 4 -> 6 x 2 x 2 -> 20 -> 9, Tanh)"
    )
    _, plain = ppvae.pairs.vae(64, 3, [20], image_shape=(1, 8, 8))
    assert plain.encoder.channels == (16, 32)


def test_encoders_of_counts_read_their_logarithms():
    x = torch.tensor([[0.0, 1.0, 1e7, 20.0]])
    for likelihood in (Poisson(), NegativeBinomial.learned()):
        for shape in ({}, {"image_shape": (1, 2, 2), "channels": [3]}):
            _, guide = ppvae.pairs.vae(4, 2, [5], likelihood, **shape)
            assert isinstance(guide.encoder, LogCounts)
            expected = guide.encoder.network(torch.log(1 + x))
            torch.testing.assert_close(guide.params(x), expected)
        for top_down in (False, True):
            _, guide = ppvae.pairs.deep_latent_gaussian(
                4, (2, 1), [5], likelihood, top_down=top_down
            )
            logs = copy.deepcopy(guide.encoder)
            logs.log_counts = False
            torch.testing.assert_close(guide.encoder(x), logs(torch.log(1 + x)))
    _, guide = ppvae.pairs.vae(4, 2, [5], Categorical(3))
    assert isinstance(guide.encoder, MLP)
    _, guide = ppvae.pairs.deep_latent_gaussian(4, (2, 1), [5], Categorical(3))
    assert not guide.encoder.log_counts


def test_positional_arguments_of_a_pair_are_what_they_were():
    """The networks of a seed, too: the decoder's weights are drawn first."""
    with ppvae.isolation.forked_rng(3):
        model, guide = ppvae.pairs.vae(6, 2, [5], "bernoulli", FullRankNormal(2))
    with ppvae.isolation.forked_rng(3):
        decoder, encoder = MLP(2, [5], 6), MLP(6, [5], 5)
    for ours, theirs in ((model.decoder, decoder), (guide.encoder, encoder)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


class _Odd(Likelihood):
    """A scale for the whole row beside its means."""

    def num_outputs(self, x_dim):
        return x_dim + 1

    def distribution(self, output):
        raise NotImplementedError

    def check(self, x):
        raise NotImplementedError


def test_sizes_that_cannot_be_halved_are_refused():
    for net in (ConvEncoder, ConvDecoder):
        arguments = {"channels": [4, 4, 4]}
        size = {"out_features": 3} if net is ConvEncoder else {"in_features": 3}
        with pytest.raises(
            ValueError, match=r"multiples of 8 \(8, 16, 24, …\); got 28 x 30.*32 x 32"
        ):
            net(image_shape=(1, 28, 30), **size, **arguments)
        with pytest.raises(ValueError, match=r"multiples of 2 .*got 4 x 3. Pad .* 4 x 4"):
            net(image_shape=(1, 4, 3), **size, channels=[2])
        with pytest.raises(ValueError, match=r"\(channels, height, width\).*got \(28, 28\)"):
            net(image_shape=(28, 28), **size)
        with pytest.raises(ValueError, match=r"channels: .*at least one; got \(\)"):
            net(image_shape=(1, 28, 28), **size, channels=[])
        with pytest.raises(ValueError, match=r"channels: .*positive.*got \(4, 0\)"):
            net(image_shape=(1, 28, 28), **size, channels=[4, 0])
    with pytest.raises(ValueError, match="outputs_per_pixel must be at least 1; got 0"):
        ConvDecoder(3, (1, 4, 4), 0, channels=[2])


def test_rows_of_another_size_are_refused():
    net = ConvEncoder((1, 4, 4), 3, channels=[2])
    with pytest.raises(ValueError, match=r"16 = 1 x 4 x 4 values.*got \(5, 1, 4, 4\). Flatten"):
        net(torch.zeros(5, 1, 4, 4))
    with pytest.raises(ValueError, match=r"rows of size 3"):
        ConvDecoder(3, (1, 4, 4), channels=[2])(torch.zeros(5, 2))


def test_a_pairs_image_shape_must_be_that_of_its_rows():
    with pytest.raises(
        ValueError, match=r"\(1, 8, 8\) is an image of 64 values; got x_dim=784.*x_dim=64"
    ):
        ppvae.pairs.vae(image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"channels=\(4,\).*need image_shape"):
        ppvae.pairs.vae(64, 2, channels=[4])
    with pytest.raises(ValueError, match=r"num_outputs\(16\) = 17, no multiple of 16"):
        ppvae.pairs.vae(16, 2, [3], _Odd(), image_shape=(1, 4, 4), channels=[2])
