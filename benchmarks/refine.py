"""How much of the amortization gap does `refine` bring back, and at what cost?

Trains a VAE, fits q* for some test rows, and refines them within several budgets:

    python benchmarks/refine.py digits
    python benchmarks/refine.py binarized-mnist --root FOLDER

prints the table of benchmarks/README.md.
"""

import argparse
import statistics
import time

import torch
from scipy import stats

import ppvae
from ppvae import pairs

SIZES = {"digits": (8, [100], 2000), "binarized-mnist": (50, [200, 200], 4000)}
# Draws of one evaluation of the engine behind q*, for these latent sizes.
ENGINE_DRAWS = 128


def timed(run):
    """The result, and the median seconds of three runs."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def gain(model, guide, other, x):
    """Mean ELBO of ``other`` less that of ``guide`` on common draws, and its error."""
    one, two = (ppvae.log_weights(model, g, x, 500, seed=1).double() for g in (guide, other))
    difference = two - one
    error = (difference.var(0) / len(difference)).sum().sqrt() / len(x)
    return float(difference.mean()), float(error)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=SIZES)
    parser.add_argument("--root")
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    z_dim, hidden, steps = SIZES[options.data]
    images = ppvae.data.load(options.data, root=options.root)
    model, guide = pairs.vae(images.train.shape[1], z_dim, hidden)
    ppvae.fit(model, guide, images.train, steps=steps, lr=1e-3, progress=False)
    x = images.test[: options.rows]
    began = time.perf_counter()
    comparison = ppvae.compare(model, guide, x, num_samples=500, evidence_samples=100)
    local = comparison.local
    gap, error = comparison.mean("amortization_gap")
    per_row = float(local.steps.double().mean()) * ENGINE_DRAWS
    print(
        f"Amortization gap {gap:.3f} ± {error:.3f} nats; compare took "
        f"{time.perf_counter() - began:.0f} s."
    )
    print(f"q*: {per_row:.0f} gradient evaluations a row, {local.seconds:.1f} s.\n")
    full, seconds = timed(lambda: ppvae.refine(model, guide, x))
    measured = comparison.dataset["amortization_gap"].values
    rank = stats.spearmanr(full.predicted_gap.numpy(), measured).statistic
    spent = float(full.evaluations.double().mean())
    print(f"Spearman's rank correlation of predicted and measured gap: {rank:.3f}\n")
    print("| budget | evaluations a row | of q* | seconds, of q* | gap brought back |")
    print("|---|---|---|---|---|")
    for share in (0.45, 0.5, 0.6, 0.8, None):
        budget = None if share is None else share * spent
        try:
            done, seconds = timed(lambda b=budget: ppvae.refine(model, guide, x, budget=b))
        except ValueError:  # Less than the prediction takes.
            continue
        value, its_error = gain(model, guide, done.guide, x)
        cost = float(done.evaluations.double().mean())
        label = "none" if share is None else f"{share:.0%} of its own"
        print(
            f"| {label} | {cost:.0f} | {cost / per_row:.2%} | {seconds / local.seconds:.2%} | "
            f"{value / gap:.0%} ± {its_error / gap:.0%} |"
        )


if __name__ == "__main__":
    main()
