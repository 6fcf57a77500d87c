"""Is annealing from the guide as tight as importance weighting with ten times its evaluations?

Trains a VAE on static binarised MNIST and judges test images by both, and by annealing from the
prior; then closes the sandwich on images that the model draws itself:

    OMP_NUM_THREADS=1 python benchmarks/annealing_mnist.py --root FOLDER --out annealing.json

An evaluation is one of the decoder at one latent: with a gradient in annealing, without one in
importance weighting, so that CPU seconds are given beside it. Annealing's pilot run is in the
seconds, but not in the number of evaluations.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

import ppvae
from ppvae import pairs

# Steps and learning rate of each round of training.
ROUNDS = [(6000, 1e-3), (1500, 3e-4), (500, 1e-4)]
CHAINS, LEAPFROG = 16, 5


def train(images, share):
    """A pair, after all rounds or a share of each."""
    model, guide = pairs.vae(images.shape[1], 50, [200, 200])
    for seed, (steps, lr) in enumerate(ROUNDS):
        options = {"lr": lr, "batch_size": 128, "compile": "auto", "progress": False}
        fit = ppvae.fit(
            model, guide, images, steps=max(1, int(share * steps)), seed=seed, **options
        )
        print(fit, flush=True)
    return model, guide


def judged(name, estimate):
    """Run an estimate; its figures."""
    began = time.process_time()
    found = estimate()
    seconds = time.process_time() - began
    figures = {"log_p": found.mean, "monte_carlo_stderr": found.mean_stderr, "cpu_seconds": seconds}
    if isinstance(found, ppvae.AnnealedEstimate):
        figures["sd_of_log_weight"] = float(found.log_weights.std(dim=0).mean())
        figures["acceptance"] = float(found.acceptance.mean())
    print(name, json.dumps(figures), flush=True)
    return found, figures


def main():
    """Train, judge, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder that holds binarized_mnist")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--rows", type=int, default=100, help="test images")
    parser.add_argument("--share", type=float, default=1.0, help="of the training and temperatures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    images = ppvae.data.load("binarized-mnist", root=options.root)
    # The test images are grouped by digit.
    x = images.test[torch.randperm(len(images.test))[: options.rows]]
    began = time.process_time()
    model, guide = train(images.train, options.share)
    print(f"trained in {time.process_time() - began:.0f} CPU s", flush=True)
    judge(model, guide, x, options)


def judge(model, guide, x, options):
    """All estimates for some rows, printed or written."""
    few, many = (max(2, int(options.share * steps)) for steps in (100, 500))
    settings = {"num_chains": CHAINS, "leapfrog_steps": LEAPFROG, "seed": options.seed}
    draws = 10 * CHAINS * LEAPFROG * few
    figures = {"rows": len(x), "draws": draws, "torch": torch.__version__}
    found = {}
    runs = {
        "elbo": lambda: ppvae.elbo(model, guide, x, 1000),
        f"ais, guide, {few}": lambda: ppvae.ais(model, guide, x, num_steps=few, **settings),
        f"iwae, {draws}": lambda: ppvae.iwae(model, guide, x, draws),
        f"ais, guide, {many}": lambda: ppvae.ais(model, guide, x, num_steps=many, **settings),
        f"ais, prior, {many}": lambda: ppvae.ais(model, None, x, num_steps=many, **settings),
    }
    for name, run in runs.items():
        found[name], figures[name] = judged(name, run)
    annealed, weighted = (found[name].value.double() for name in list(runs)[1:3])
    gain = annealed - weighted
    # Over these rows: of the two estimates' own errors.
    noise = math.hypot(*(found[name].mean_stderr for name in list(runs)[1:3]))
    figures["ais less iwae"] = {"mean": float(gain.mean()), "monte_carlo_stderr": noise}
    for start, steps in ((guide, few), (guide, 2 * few), (None, many)):
        both = ppvae.sandwich(model, start, x, num_steps=steps, **settings)
        name = f"sandwich, {'prior' if start is None else 'guide'}, {steps}"
        figures[name] = {"width": both.width, "stderr": both.width_stderr}
        print(name, both, flush=True)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
