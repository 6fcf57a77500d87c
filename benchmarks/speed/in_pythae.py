"""pythae's VAE with the same networks, stepped by its trainer."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor

from speed.arena import MissingError
from speed.in_pyro import network
from speed.problems import Problem
from speed.steps import Steps


class Encoder(BaseEncoder):
    """Means and log variances from one network."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.net = network(problem, "encoder", "cpu")

    def forward(self, x: Tensor) -> ModelOutput:
        """As pythae wants it."""
        loc, log_var = self.net(x).chunk(2, dim=-1)
        return ModelOutput(embedding=loc, log_covariance=log_var)


class Decoder(BaseDecoder):
    """Probabilities, as pythae's own decoders give them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.net = network(problem, "decoder", "cpu")

    def forward(self, z: Tensor) -> ModelOutput:
        """As pythae wants it."""
        return ModelOutput(reconstruction=self.net(z).sigmoid())


def vae(problem: Problem) -> VAE:
    """The VAE with the problem's first parameters."""
    x_dim, z_dim = problem.batches.shape[-1], problem.params["decoder.0.weight"].shape[1]
    config = VAEConfig(input_dim=(x_dim,), latent_dim=z_dim, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(problem), decoder=Decoder(problem))


class Loader:
    """Batches that are there already."""

    def __init__(self, batches: list[DatasetOutput], dataset: BaseDataset) -> None:
        self.held, self.dataset = batches, dataset

    def __iter__(self) -> Any:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Trainer(Steps):
    """`BaseTrainer.train_step`, which goes round a loader.

    With ``options["loader"]`` that is pythae's own, else one that hands out ready batches.
    """

    def setup(self) -> None:
        logging.disable(logging.INFO)
        torch.manual_seed(1)
        if self.problem.kind != "vae":
            raise MissingError("pythae has autoencoders alone")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise MissingError("torch sees no GPU")
        self.folder = tempfile.TemporaryDirectory()

    def batches(self) -> list[Any]:
        return [DatasetOutput(data=torch.tensor(x)) for x in self.problem.batches]

    def start(self, lr: float) -> None:
        x = torch.tensor(self.problem.batches).flatten(0, 1)
        self.dataset = BaseDataset(x, torch.ones(len(x)))
        config = BaseTrainerConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=self.problem.rows,
            learning_rate=lr,
            optimizer_cls="Adam",
            no_cuda=self.device == "cpu",
        )
        self.trainer = BaseTrainer(vae(self.problem), self.dataset, training_config=config)
        self.trainer.prepare_training()
        self.own = self.trainer.train_loader

    def over(self, batches: list[Any]) -> float:
        """One round of ready batches; their mean loss."""
        self.trainer.train_loader = Loader(batches, self.dataset)
        return self.trainer.train_step(epoch=1)

    def step(self, x: Any) -> float:
        return self.over([x]) * self.problem.rows

    def steps(self, count: int) -> int:
        if not self.options.get("loader"):
            self.over([next(self._stream) for _ in range(count)])
            return count
        epochs = -(-count // len(self.own))
        self.trainer.train_loader = self.own
        for _ in range(epochs):
            self.trainer.train_step(epoch=1)
        return epochs * len(self.own)
