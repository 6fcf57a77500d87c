"""How well does M2 classify MNIST with 100 labels, against a classifier trained on them alone?

Static binarised MNIST, 10 labels a class, the other training images without labels:

    python benchmarks/semisupervised_mnist.py --root FOLDER --minutes 10 --draws 3 --out m2.json

trains a pair for each draw of the labels, one CPU thread, `--minutes` of the process's CPU time
for all pairs together, and prints the table of benchmarks/README.md.
"""

import argparse
import json
import math
import statistics
import time

import torch

import ppvae
from ppvae import pairs
from ppvae.nn import MLP
from ppvae.objectives import SemisupervisedELBO

Z_DIM, HIDDEN, BATCH, LR = 30, [300], 200, 2e-3
# A tenth of the rows of the training set are labelled, copies counted: α = 1 is then the paper's.
SHARE, ALPHA = 0.1, 1.0
CLASSIFIER_STEPS = 500
# The pair starts from the labelled rows alone: classes found without them need not be the digits.
FIRST_STEPS, FIRST_ALPHA = 150, 10.0


def draw_labels(labels, per_class, seed):
    """Labels of as many rows of each class, −1 elsewhere."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = [order[labels[order] == k][:per_class] for k in labels.unique()]
    out = torch.full_like(labels, -1)
    out[torch.cat(kept)] = labels[torch.cat(kept)]
    return out


def accuracy(classes, labels):
    """Share of the classes that are right."""
    return float((classes == labels).double().mean())


def supervised(images, labels, seed):
    """Test accuracy of the guide's classifier network, trained on the labelled rows alone."""
    torch.manual_seed(seed)
    known = labels >= 0
    net = MLP(images.x_dim, HIDDEN, 10)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(CLASSIFIER_STEPS):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(images.train[known]), labels[known]).backward()
        adam.step()
    with torch.no_grad():
        return accuracy(net(images.test).argmax(dim=1), images.test_labels)


def semisupervised(images, labels, seed, seconds):
    """Train M2 for so many seconds of CPU time; what it reached on the test rows."""
    torch.manual_seed(seed)
    model, guide = pairs.semisupervised_vae(images.x_dim, Z_DIM, 10, HIDDEN)
    rows = model.rows(images.train, labels)
    known = rows[labels >= 0]
    copies = round(SHARE / (1 - SHARE) * len(rows) / len(known))
    x = torch.cat([rows[labels < 0], known.repeat(copies, 1)])

    def train(x, steps, alpha):
        began, loss = time.process_time(), SemisupervisedELBO(alpha=alpha)
        options = {"batch_size": BATCH, "lr": LR, "seed": steps, "progress": False}
        fit = ppvae.fit(model, guide, x, loss=loss, steps=steps, **options)
        return fit, time.process_time() - began

    _, first = train(known, FIRST_STEPS, FIRST_ALPHA)
    _, spent = train(x, 20, ALPHA)
    fit, more = train(x, max(1, int((seconds - first - spent) / (spent / 20))), ALPHA)
    test = model.rows(images.test)
    bound = ppvae.elbo(model, guide, test[:2000], 20)
    # 20 draws a row: the error over rows is what is left.
    return {
        "accuracy": accuracy(ppvae.classify(guide, test).argmax(dim=1), images.test_labels),
        "elbo": bound.mean,
        "elbo_stderr_over_rows": float(bound.value.std()) / math.sqrt(len(bound.value)),
        "status": fit.status,
        "steps": fit.steps + 20,
        "epochs": (fit.steps + 20) * BATCH / len(x),
        "cpu_seconds": first + spent + more,
    }


def mean_and_error(values):
    """Mean over label draws and its standard error, NaN for a single draw."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def main():
    """Train, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--draws", type=int, default=3, help="draws of the labels, for M2")
    parser.add_argument("--classifier-draws", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = ppvae.data.load("mnist", root=options.root)
    alone, pair = [], []
    for seed in range(max(options.classifier_draws, options.draws)):
        labels = draw_labels(images.train_labels, options.per_class, seed)
        if seed < options.classifier_draws:
            alone.append(supervised(images, labels, seed))
        if seed < options.draws:
            seconds = 60 * options.minutes / options.draws
            pair.append(semisupervised(images, labels, seed, seconds))
            print(f"label draw {seed}: {pair[-1]}", flush=True)
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump({"options": vars(options), "classifier": alone, "m2": pair}, file)
    reached = [run["accuracy"] for run in pair]
    print("| trained on | label draws | test accuracy |\n|---|---|---|")
    print("| labels alone | {} | {:.1%} ± {:.1%} |".format(len(alone), *mean_and_error(alone)))
    print("| M2 | {} | {:.1%} ± {:.1%} |".format(len(pair), *mean_and_error(reached)))


if __name__ == "__main__":
    main()
