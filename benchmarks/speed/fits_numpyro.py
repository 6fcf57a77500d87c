"""Per-datapoint fits in NumPyro: Adam with a cosine schedule, in `lax.scan`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro import infer
from numpyro.distributions import constraints

from speed.in_numpyro import on_device


class Scan:
    """`numpyro.infer.SVI` over all rows at once.

    Args:
        kind: ``"digits"`` or ``"toy"``.
        path: File with the decoder and the rows.
        device: Where it runs.
    """

    CHUNK = 10

    def __init__(self, kind: str, path: str, device: str = "cpu") -> None:
        jax.config.update("jax_default_device", on_device(device))
        with np.load(path) as held:
            self.p = {name: jnp.asarray(held[name]) for name in held.files}
        self.x, self.kind = self.p.pop("x"), kind
        wide = () if kind == "toy" else (self.p["decoder.0.weight"].shape[1],)
        self.zero = np.zeros((len(self.x), *wide), dtype="float32")
        self.programs: dict[tuple[int, int, float], Any] = {}

    def model(self, x: Any) -> None:
        """The model."""
        p = self.p
        with numpyro.plate("data", x.shape[0]):
            if self.kind == "toy":
                z = numpyro.sample("z", dist.Exponential(1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return
            z = numpyro.sample("z", dist.Normal(0, 1).expand(self.zero.shape[1:]).to_event(1))
            hidden = jax.nn.relu(z @ p["decoder.0.weight"].T + p["decoder.0.bias"])
            logits = hidden @ p["decoder.2.weight"].T + p["decoder.2.bias"]
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Any) -> None:
        """A row for each datum."""
        loc = numpyro.param("loc", self.zero)
        scale = numpyro.param("scale", self.zero + 1, constraint=constraints.positive)
        with numpyro.plate("data", x.shape[0]):
            if self.kind == "toy":
                numpyro.sample("z", dist.LogNormal(loc, scale))
            else:
                numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def program(self, steps: int, draws: int, lr: float) -> Any:
        """The whole fit, compiled; a schedule's length is a constant in it."""
        if (steps, draws, lr) not in self.programs:
            elbo = infer.TraceMeanField_ELBO if self.kind == "digits" else infer.Trace_ELBO
            adam = numpyro.optim.Adam(lambda i: 0.5 * lr * (1 + jnp.cos(jnp.pi * i / steps)))
            svi = infer.SVI(self.model, self.guide, adam, elbo(num_particles=draws))

            def run(key: Any, x: Any) -> Any:
                state = svi.init(key, x)
                state, _ = lax.scan(lambda s, _: svi.update(s, x), state, length=steps)
                return svi.get_params(state)

            self.programs[steps, draws, lr] = jax.jit(run)
        return self.programs[steps, draws, lr]

    def fit(self, steps: int, draws: int, lr: float) -> np.ndarray:
        """Fit all rows from the standard member."""
        found = self.program(steps, draws, lr)(jax.random.key(1), self.x)
        loc, scale = (np.asarray(found[name]) for name in ("loc", "scale"))
        both = [loc, np.log(scale)]
        return np.concatenate([each.reshape(len(loc), -1) for each in both], axis=-1)
