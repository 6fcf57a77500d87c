"""A sigmoid belief network with 200 units on static binarised MNIST.

Trains by score-function gradients with an input-dependent baseline (Mnih & Gregor 2014), on one
thread, until the process has used its CPU minutes, and reports −ELBO of the 10,000 test rows:

    python benchmarks/sbn_mnist.py --root FOLDER --minutes 8 --out sbn.json

FOLDER holds `binarized_mnist` (see `ppvae.data.load`), which trains on 60,000 rows. Published for
200 units: 113.5 nats (the table of Gu et al. 2016, MuProp; score function with control variates).
"""

import argparse
import json
import time
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, TraceGraph_ELBO

import ppvae
from ppvae import pairs


def main():
    """Train, and write what was reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="CPU time of the training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = ppvae.data.load("binarized-mnist", root=options.root)
    # Layers as published: a linear encoder; the baseline has one hidden layer.
    model, guide = pairs.sigmoid_belief_network(
        784, [200], [], baseline=None if options.no_baseline else [100]
    )
    train = images.train
    with torch.no_grad():
        # As usual for decoders of binary pixels: start at the pixels' own frequencies.
        frequency = train.mean(0).clamp(1e-3, 1 - 1e-3)
        model.layers[0].bias.copy_(torch.logit(frequency))

    optimizer = pyro.optim.Adam({"lr": options.lr})
    svi = SVI(model, guide, optimizer, TraceGraph_ELBO())
    budget, began = 60 * options.minutes, time.process_time()
    curve, steps, losses = [], 0, []
    while (spent := time.process_time() - began) < budget:
        order = torch.randperm(len(train))
        for at in range(0, len(train) - options.batch + 1, options.batch):
            # In the last third of the time the step size falls to nothing.
            rate = options.lr * min(1.0, 3 * max(0.0, 1 - spent / budget))
            for each in optimizer.optim_objs.values():
                each.param_groups[0]["lr"] = rate
            rows = order[at : at + options.batch]
            losses.append(svi.step(train[rows]) / options.batch)
            steps += 1
            spent = time.process_time() - began
            if spent >= budget:
                break
        curve.append({"steps": steps, "cpu_seconds": spent, "loss": sum(losses) / len(losses)})
        losses = []
        print(curve[-1], flush=True)

    test = ppvae.elbo(model, guide, images.test, 20, seed=1)
    bound = ppvae.iwae(model, guide, images.test[torch.randperm(10_000)[:500]], 1000, seed=2)
    result = {
        "steps": steps,
        "cpu_minutes": spent / 60,
        "batch": options.batch,
        "lr": options.lr,
        "baseline": not options.no_baseline,
        "negative_elbo_test": -test.mean,
        "negative_elbo_test_stderr": test.mean_stderr,
        "iwae_1000_negative_500_rows": -bound.mean,
        "iwae_stderr": bound.mean_stderr,
        "published_negative_elbo": 113.5,
        "curve": curve,
    }
    print({name: value for name, value in result.items() if name != "curve"})
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
