"""What training on the importance-weighted bound costs in ELBO and brings in log p, on MNIST.

Trains the VAE 784-200-200-50 on static binarised MNIST by `ppvae.fit` from the same parameters with
the ELBO, with the bound of K draws, and with its doubly reparameterised gradient, for the same CPU
time each, and judges the same test images:

    OMP_NUM_THREADS=1 python benchmarks/objectives_mnist.py --root FOLDER --minutes 10 --out o.json

The schedule of the learning rate is that of `static_mnist.py`.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from static_mnist import BLOCK, train_for

import ppvae
from ppvae import pairs
from ppvae.evidence import elbo_of, iwae_of
from ppvae.objectives import IWAE, BetaELBO, DReG


def judge(model, guide, x, draws):
    """ELBO and importance-weighted log p of each row, with their Monte Carlo errors."""
    found = {"elbo": [], "log_p": []}
    for number, rows in enumerate(x.split(BLOCK)):
        weights = ppvae.log_weights(model, guide, rows, draws, seed=number)
        found["elbo"].append(elbo_of(weights))
        found["log_p"].append(iwae_of(weights))
    return {
        name: tuple(torch.cat([getattr(p, part) for p in parts]) for part in ("value", "stderr"))
        for name, parts in found.items()
    }


def with_errors(value, noise):
    """The mean over images; its error over images, and that of the draws alone."""
    count = len(value)
    return {
        "mean": float(value.mean()),
        "stderr": float(value.std()) / math.sqrt(count),
        "monte_carlo_stderr": float(noise.square().sum().sqrt()) / count,
    }


def main():
    """Train on each objective, judge, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder that holds binarized_mnist")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU minutes for each")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--particles", type=int, default=5, help="K")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=5000, help="per test image")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    images = ppvae.data.load("binarized-mnist", root=options.root)
    # The test images are grouped by digit.
    test = images.test[torch.randperm(len(images.test))[: options.test_images]]
    count = options.particles
    objectives = {"ELBO": BetaELBO(), "IWAE": IWAE(count), "DReG": DReG(count)}
    asked = {key: value for key, value in vars(options).items() if key not in ("root", "out")}
    figures, first = {**asked, "torch": torch.__version__}, None
    for name, objective in objectives.items():
        torch.manual_seed(options.seed)
        model, guide = pairs.vae(images.train.shape[1], 50, [200, 200])
        seconds = 60 * options.minutes
        spent = train_for(model, guide, images.train, seconds, options.batch_size, objective)
        judged = judge(model, guide, test, options.draws)
        first = judged if first is None else first
        figures[name] = {**spent, **{key: with_errors(*pair) for key, pair in judged.items()}}
        if judged is not first:
            # Of the same images, so that how they differ does not matter.
            for key, (value, noise) in judged.items():
                figures[name][f"{key}_over_the_first"] = with_errors(
                    value - first[key][0], torch.hypot(noise, first[key][1])
                )
        print(name, json.dumps(figures[name], indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
