r"""Weights have nothing to amortize, latent inputs have
=====================================================
"""

import os

import matplotlib.pyplot as plt
import torch
from pyro.infer import TraceMeanField_ELBO

import ppvae
from ppvae import pairs
from ppvae.families import DiagonalNormal
from ppvae.isolation import forked_rng
from ppvae.models import BayesianNeuralNetwork

QUICK = bool(os.environ.get("PPVAE_QUICK"))

with forked_rng(0):
    u = torch.cat([torch.rand(30, 1) - 2.0, torch.rand(30, 1) + 1.0])
    x = torch.cat([u, torch.sin(2 * u) + 0.1 * torch.randn(60, 1)], dim=1)
grid = torch.linspace(-3.5, 3.5, 141)[:, None]
loss = TraceMeanField_ELBO(5, vectorize_particles=True, max_plate_nesting=1)
import time
predictions = {}
for name, rank in {"mean field": None, "low rank, 10 columns": 10}.items():
    t=time.time()
    with forked_rng(1):
        model, guide = pairs.bayesian_neural_network(
            hidden=(20,), rank=rank, prior_scale=2.0, noise=0.1, num_data=60
        )
    for lr in (2e-2, 2e-3):
        fit = ppvae.fit(
            model, guide, x, loss=loss, steps=100 if QUICK else 1500, batch_size=60, lr=lr, progress=False
        )
    print(name, fit, time.time()-t)
    predictions[name] = p = model.predict(grid, guide)
    for where, at in {"among": 35, "between": 70, "beyond": 0}.items():
        print(where, float(grid[at]), float(p.mean[at]), float(p.noise_sd[at]), float(p.weight_sd[at]))
    print("model", -ppvae.fit(model, guide, x, loss=TraceMeanField_ELBO(2000, vectorize_particles=True, max_plate_nesting=1), steps=2, batch_size=60, lr=1e-12,progress=False).losses*60)
