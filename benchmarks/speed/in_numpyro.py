"""The same pairs in NumPyro: a jitted step, and `lax.scan` over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro import infer
from numpyro.distributions import constraints

from speed.arena import MissingError
from speed.problems import Problem
from speed.steps import Steps

Program = Callable[[Any], Any]


def layers(problem: Problem, name: str, x: Any) -> Any:
    """Two layers with a ReLU between them, their parameters NumPyro's."""
    values = {
        key: numpyro.param(key, jnp.asarray(value))
        for key, value in problem.params.items()
        if key.startswith(name)
    }
    hidden = jax.nn.relu(x @ values[f"{name}.0.weight"].T + values[f"{name}.0.bias"])
    return hidden @ values[f"{name}.2.weight"].T + values[f"{name}.2.bias"]


def vae_pair(problem: Problem) -> tuple[Program, Program]:
    """The VAE as two functions."""
    z_dim = problem.params["decoder.0.weight"].shape[1]

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([z_dim]).to_event(1))
            logits = layers(problem, "decoder", z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            loc, log_var = jnp.split(layers(problem, "encoder", x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_var)).to_event(1))

    return model, guide


def toy_pair(problem: Problem) -> tuple[Program, Program]:
    """The toy as two functions."""
    # NumPy's, as JAX's own would be given away with the first state.
    loc0, scale0 = problem.params["loc"], np.exp(problem.params["log_scale"])

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Exponential(1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            loc = numpyro.param("loc", loc0)
            scale = numpyro.param("scale", scale0, constraint=constraints.positive)
            numpyro.sample("z", dist.LogNormal(loc, scale))

    return model, guide


def on_device(device: str) -> Any:
    """JAX's device for one of torch's names.

    Raises:
        MissingError: If this JAX has none.
    """
    kind = "cpu" if device == "cpu" else "gpu"
    try:
        return jax.devices(kind)[0]
    except RuntimeError:
        raise MissingError(f"this JAX has no {kind}") from None


class Step(Steps):
    """`numpyro.infer.SVI.update` under `jax.jit`."""

    def setup(self) -> None:
        jax.config.update("jax_default_device", on_device(self.device))
        pairs = {"vae": vae_pair, "toy": toy_pair}
        self.model, self.guide = pairs[self.problem.kind](self.problem)

    def batches(self) -> list[Any]:
        return [jnp.asarray(x) for x in self.problem.batches]

    def start(self, lr: float) -> None:
        elbo = infer.TraceMeanField_ELBO() if self.problem.kind == "vae" else infer.Trace_ELBO()
        self.svi = infer.SVI(self.model, self.guide, numpyro.optim.Adam(lr), elbo)
        self.state = self.svi.init(jax.random.key(1), self.batches()[0])
        self.update = jax.jit(self.svi.update, donate_argnums=0)

    def step(self, x: Any) -> Any:
        self.state, loss = self.update(self.state, x)
        return loss


class Scan(Step):
    """Many steps in one `lax.scan`, which goes round the batches inside."""

    CHUNK = 20

    def start(self, lr: float) -> None:
        super().start(lr)
        self.stack, self.at = jnp.asarray(self.problem.batches), 0

        def run(state: Any, stack: Any, at: Any) -> Any:
            each = (at + jnp.arange(self.CHUNK)) % stack.shape[0]
            return lax.scan(lambda s, i: self.svi.update(s, stack[i]), state, each)

        self.run = jax.jit(run, donate_argnums=0)

    def chunk(self) -> Any:
        """Steps of one scan; their losses."""
        self.state, losses = self.run(self.state, self.stack, self.at)
        self.at += self.CHUNK
        return losses

    def steps(self, count: int) -> int:
        chunks = -(-count // self.CHUNK)
        for _ in range(chunks):
            losses = self.chunk()
        losses.block_until_ready()
        return chunks * self.CHUNK

    def losses(self, count: int) -> list[float]:
        chunks = [np.asarray(self.chunk()) for _ in range(-(-count // self.CHUNK))]
        return [float(loss) / self.problem.rows for loss in np.concatenate(chunks)[:count]]
