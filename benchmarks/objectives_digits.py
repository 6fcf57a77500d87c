"""What training on the importance-weighted bound costs in ELBO and brings in log p, on digits.

Trains a VAE on the 8x8 digits by `ppvae.fit` from the same parameters and on the same minibatches
with the ELBO, with the bound of K draws, and with its doubly reparameterised gradient, for the same
number of steps, and judges training rows and held-out ones:

    OMP_NUM_THREADS=1 python benchmarks/objectives_digits.py --seeds 0 1 2

Each line is a difference in nats a datum, with its standard error over paired rows.
"""

import argparse
import math

import torch
from torch.utils.data import DataLoader, TensorDataset

import ppvae
from ppvae import pairs
from ppvae.evidence import elbo_of, iwae_of
from ppvae.isolation import forked_rng
from ppvae.objectives import IWAE, BetaELBO, DReG


def judge(model, guide, x, draws):
    """ELBO and importance-weighted log p of each row, from the same draws."""
    weights = [
        ppvae.log_weights(model, guide, rows, draws, seed=number)
        for number, rows in enumerate(x.split(100))
    ]
    together = torch.cat(weights, dim=1)
    return {"ELBO": elbo_of(together), "log p": iwae_of(together)}


def train(loss, x, options, seed):
    """A pair from the seed's parameters, on the seed's minibatches."""
    with forked_rng(seed):
        model, guide = pairs.vae(x.shape[1], 8, [100])
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x), 100, shuffle=True, drop_last=True, generator=order)
    ppvae.fit(
        model, guide, loader, loss=loss, steps=options.steps, lr=2e-3, seed=seed, progress=False
    )
    return model, guide


def main():
    """Train, judge and print, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--particles", type=int, default=50, help="K")
    parser.add_argument("--draws", type=int, default=5000, help="per row, to judge")
    options = parser.parse_args()
    digits = ppvae.data.load("digits")
    splits = {"training": digits.train, "held out": digits.test}
    for seed in options.seeds:
        judged = {}
        for loss in (BetaELBO(), IWAE(options.particles), DReG(options.particles)):
            pair = train(loss, digits.train, options, seed)
            judged[type(loss).__name__] = {
                name: judge(*pair, x, options.draws) for name, x in splits.items()
            }
        for name, split in judged["BetaELBO"].items():
            figures = [f"{bound} {estimate.mean:.2f}" for bound, estimate in split.items()]
            print(f"seed {seed}, {name} rows, trained on the ELBO: {', '.join(figures)}")
            for one, other in (("IWAE", "BetaELBO"), ("DReG", "BetaELBO"), ("DReG", "IWAE")):
                figures = []
                for bound in split:
                    rows = judged[one][name][bound].value - judged[other][name][bound].value
                    error = float(rows.std()) / math.sqrt(len(rows))
                    figures.append(f"{bound} {float(rows.mean()):+.2f} ± {error:.2f}")
                print(f"  {one} less {other}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
