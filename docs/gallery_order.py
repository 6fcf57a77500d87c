"""The order of the gallery: what to read first stands first."""

from pathlib import Path

ORDER = (
    # Where to begin.
    "plot_toy.py",
    "plot_digits_vae.py",
    "plot_foreign_pairs.py",
    "plot_pictures.py",
    # Mending a gap.
    "plot_explain.py",
    "plot_repairs.py",
    "plot_refine.py",
    # Judging.
    "plot_calibration.py",
    "plot_sandwich.py",
    "plot_arviz.py",
    # Training.
    "plot_compiled_steps.py",
    "plot_gradient_estimators.py",
    "plot_annealing.py",
    # Models.
    "plot_generation.py",
    "plot_autoencoder.py",
    "plot_priors_and_posteriors.py",
    "plot_linear_models.py",
    "plot_mixture_and_series.py",
    "plot_deep_latent_gaussian.py",
    "plot_sigmoid_belief_network.py",
    "plot_deep_exponential_family.py",
    "plot_bayesian_neural_network.py",
    "plot_semisupervised_vae.py",
    "plot_implicit_model.py",
)


class FirstThingsFirst:
    """Sphinx-gallery's key for the examples of a folder; those that are not named come last."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, filename: str) -> tuple[int, str]:
        name = Path(filename).name
        return ORDER.index(name) if name in ORDER else len(ORDER), name

    def __repr__(self) -> str:
        return "<FirstThingsFirst>"
