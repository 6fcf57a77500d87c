"""Importance-weighted evidence in NumPyro: its densities, `lax.map` over chunks of draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from speed.in_numpyro import on_device


class Mapped:
    """One compiled program for all chunks.

    Args:
        path: File with the parameters and the rows.
        draws: Draws for each row.
        device: Where it runs.
        chunk: Draws times rows that are decoded at once.
    """

    def __init__(self, path: str, draws: int, device: str = "cpu", chunk: int = 4000) -> None:
        jax.config.update("jax_default_device", on_device(device))
        with np.load(path) as held:
            p = {name: jnp.asarray(held[name]) for name in held.files}
        self.x = x = p.pop("x")
        each = max(1, min(draws, chunk // len(x)))
        while draws % each:
            each -= 1

        def net(name: str, value: Any) -> Any:
            hidden = jax.nn.relu(value @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"])
            return hidden @ p[f"{name}.2.weight"].T + p[f"{name}.2.bias"]

        def run(key: Any) -> Any:
            loc, log_var = jnp.split(net("encoder", x), 2, axis=-1)
            guide = dist.Normal(loc, jnp.exp(0.5 * log_var)).to_event(1)

            def part(own: Any) -> Any:
                z = guide.sample(own, (each,))
                prior = dist.Normal(0, 1).expand(loc.shape[-1:]).to_event(1)
                likelihood = dist.Bernoulli(logits=net("decoder", z)).to_event(1)
                return prior.log_prob(z) + likelihood.log_prob(x) - guide.log_prob(z)

            weights = lax.map(part, jax.random.split(key, draws // each)).reshape(draws, -1)
            value = jax.nn.logsumexp(weights, axis=0) - jnp.log(draws)
            return value, jnp.exp(weights - value).std(axis=0, ddof=1) / jnp.sqrt(draws)

        self.program, self.key = jax.jit(run), jax.random.key(1)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """The bound for each row, and its standard error."""
        self.key, own = jax.random.split(self.key)
        value, error = self.program(own)
        return np.asarray(value), np.asarray(error)

    def peak(self) -> None:
        """JAX keeps memory of its own: not measured."""
        return
