"""How good is the mean-field VAE on static binarised MNIST after some minutes of one CPU core?

Trains by `ppvae.fit` for a budget of CPU time and judges the test images:

    OMP_NUM_THREADS=1 python benchmarks/static_mnist.py --root FOLDER --minutes 10 --out plain.json
    OMP_NUM_THREADS=1 python benchmarks/static_mnist.py --root FOLDER --prior vamp --out vamp.json

The budget counts CPU time of training alone, as other processes may share the machine; wall time
is reported beside it. The learning rate falls twice, after 60% and 85% of the budget.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

import ppvae
from ppvae import pairs
from ppvae.evidence import elbo_of, iwae_of

PSEUDO_INPUTS = 500
# Share of the budget and learning rate of each round of training.
ROUNDS = [(0.1, 1e-3)] * 6 + [(0.125, 3e-4)] * 2 + [(0.15, 1e-4)]
# Images judged at once.
BLOCK = 50


def build(prior, train, z_dim, hidden):
    """The pair: a diagonal normal guide, and the prior asked for."""
    options = {}
    if prior == "vamp":
        start = torch.randperm(len(train))[:PSEUDO_INPUTS]
        options["pseudo_inputs"] = train[start]
    return pairs.vae(train.shape[1], z_dim, hidden, **options)


def train_for(model, guide, train, seconds, batch_size, loss=None):
    """Fit for so many seconds of CPU time; give what was spent."""
    began_cpu, began = time.process_time(), time.perf_counter()

    def spent():
        return time.process_time() - began_cpu

    steps = 50  # To see how fast it goes.
    options = {"loss": loss, "batch_size": batch_size, "progress": False}
    ppvae.fit(model, guide, train, steps=steps, seed=1000, **options)
    per_step, until = spent() / steps, 0.0
    losses = []
    for seed, (share, lr) in enumerate(ROUNDS):
        until += share * seconds
        count = max(1, int((until - spent()) / per_step))
        before = spent()
        fit = ppvae.fit(model, guide, train, steps=count, lr=lr, seed=seed, **options)
        if not fit.completed:
            raise SystemExit(fit.status)
        steps += count
        per_step = (spent() - before) / count
        losses.append(float(fit.losses[-min(count, 200) :].mean()))
        print(f"{spent():7.0f} CPU s, {steps:7d} steps, loss {losses[-1]:.2f}", flush=True)
    return {
        "cpu_seconds": spent(),
        "wall_seconds": time.perf_counter() - began,
        "steps": steps,
        "epochs": steps * batch_size / len(train),
        "training_loss": losses[-1],
    }


def judge(model, guide, x, draws):
    """ELBO and importance-weighted log p of the rows, from the same draws."""
    elbos, evidences = [], []
    for number, rows in enumerate(x.split(BLOCK)):
        weights = ppvae.log_weights(model, guide, rows, draws, seed=number)
        elbos.append(elbo_of(weights))
        evidences.append(iwae_of(weights))
    figures = {"test_images": len(x), "draws": draws}
    for name, parts in (("elbo", elbos), ("log_p", evidences)):
        value = torch.cat([part.value for part in parts]).double()
        noise = torch.cat([part.stderr for part in parts]).double()
        figures[name] = float(value.mean())
        # Two errors: had other images been drawn, and had other latents been.
        figures[f"{name}_stderr"] = float(value.std()) / math.sqrt(len(value))
        figures[f"{name}_monte_carlo_stderr"] = float(noise.square().sum().sqrt()) / len(value)
    return figures


def main():
    """Train, judge, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder that holds binarized_mnist")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU minutes of training")
    parser.add_argument("--prior", choices=["standard", "vamp"], default="standard")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--z-dim", type=int, default=40)
    parser.add_argument("--hidden", type=int, nargs="+", default=[300, 300])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=500, help="per test image")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    images = ppvae.data.load("binarized-mnist", root=options.root)
    # The test images are grouped by digit.
    test = images.test[torch.randperm(len(images.test))[: options.test_images]]
    model, guide = build(options.prior, images.train, options.z_dim, options.hidden)
    print(guide, flush=True)
    asked = {key: value for key, value in vars(options).items() if key not in ("root", "out")}
    figures = {**asked, "torch": torch.__version__}
    figures |= train_for(model, guide, images.train, 60 * options.minutes, options.batch_size)
    figures |= judge(model, guide, test, options.draws)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
