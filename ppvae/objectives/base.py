"""What the objectives of this package share: one evaluation, three ways of Pyro's to ask for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from ppvae.density import Program
from ppvae.terms import Drawn, Term


class Objective(ELBO):
    r"""An objective :math:`J`, in nats, summed over the rows; what is minimised is :math:`-J`.

    It drops into ``pyro.infer.SVI(model, guide, optim, loss)``, into `ppvae.fit` and into Pyro's
    ``objective(model, guide)``. A row counts as often as the scale of its plate says:
    ``pyro.plate("data", N, subsample_size=B)`` gives an estimate of the sum over all N.

    All draws of a row are made at once, in a plate at dim −2, so that with more than one draw the
    programs' networks must accept a leading dimension, as they must for `ppvae.elbo`.

    Args:
        num_particles: Draws of the latents for every row.
    """

    # Attributes that a step changes, and that say nothing of what it computes.
    counters = ("steps_taken", "_given")
    # The fewest draws that make sense.
    _least = 1

    def __init__(self, num_particles: int = 1) -> None:
        if num_particles < self._least or num_particles % 1:
            raise ValueError(
                f"num_particles must be at least {self._least}, and whole; got {num_particles}."
            )
        super().__init__(num_particles=num_particles, max_plate_nesting=1, vectorize_particles=True)

    @property
    @abstractmethod
    def target(self) -> str:
        """What the gradient is one of, in words; objectives of equal target can be compared."""

    @abstractmethod
    def _evaluate(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The value of J, and a tensor whose gradient is the estimate of its gradient."""

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """−J summed over the rows, one estimate, in nats."""
        with torch.no_grad():
            value = -float(self._evaluate(model, guide, args, kwargs)[0])
        warn_if_nan(value, "loss")
        return value

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """−J summed over the rows, one estimate, with the estimate of its gradient."""
        value, surrogate = self._evaluate(model, guide, args, kwargs)
        # The gradient of the one, the number of the other.
        return -(value.detach() + (surrogate - surrogate.detach()))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """−J summed over the rows; its gradients are added to those of the parameters."""
        value, surrogate = self._evaluate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            (-surrogate).backward()
        loss: float = -value.detach().item()
        warn_if_nan(loss, "loss")
        self.count_step()
        return loss

    def count_step(self) -> None:
        """Note that a step was taken, for an objective on a schedule."""

    @property
    def moving(self) -> tuple[float, ...]:
        """The numbers of the coming step that change from one to the next, such as a weight."""
        return ()

    @contextmanager
    def again(self, moving: Tensor | None = None) -> Iterator[None]:
        """Inside, a step is run once more, and is not counted.

        Args:
            moving: What to use for the numbers of `moving`, in one dimension.
        """
        yield

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no single pair of traces.")

    def _averaged(
        self,
        of: Callable[[Drawn], tuple[Tensor, Tensor]],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """What ``of`` says of all draws; of one after the other where all rows share a latent."""
        drawn = Drawn(model, guide, args, kwargs, self.num_particles)
        if self.num_particles == 1 or not drawn.shared:
            return of(drawn)
        runs = [of(Drawn(model, guide, args, kwargs, 1)) for _ in range(self.num_particles)]
        values, surrogates = zip(*runs, strict=True)
        return torch.stack(values).mean(), torch.stack(surrogates).mean()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"


class Rows:
    """A sum of terms for every draw and row, and the estimate of a mean over draws."""

    def __init__(self) -> None:
        self.local: Tensor = torch.zeros(())
        self.shared: Tensor = torch.zeros(())

    def add(self, term: Tensor, is_shared: bool = False) -> None:
        """Add a term, ``(num_draws, batch)``, or ``(num_draws, 1)`` of a site that rows share."""
        if is_shared:
            self.shared = self.shared + term
        else:
            self.local = self.local + term

    def mean(self, num_draws: int) -> Tensor:
        """The mean over draws of the sum over rows."""
        return (self.local.sum() + self.shared.sum()) / num_draws

    def estimate(self, drawn: Drawn, log_q: list[Term]) -> tuple[Tensor, Tensor]:
        """That mean, and what has its gradient, also for draws without a path of their own.

        Args:
            drawn: The draws.
            log_q: The guide's terms at them.
        """
        draws = drawn.num_draws
        value = surrogate = self.mean(draws)
        for term in log_q:
            if not getattr(term.fn, "has_rsample", False):
                if term.is_shared:
                    raise ValueError(
                        f"Site {term.name!r} is shared by all rows, and its draws cannot be "
                        f"reparameterised. Use pyro.infer.TraceGraph_ELBO."
                    )
                # What lies outside of all plates may hang on the draws of any row.
                signal = leave_one_out((self.local + self.shared).detach())
                surrogate = surrogate + (signal * term.log_prob).sum() / draws
        return value, surrogate


def leave_one_out(signal: Tensor) -> Tensor:
    r"""A learning signal less what the other draws of the row say it is.

    .. math:: f_k - \frac{1}{K - 1} \sum_{j \ne k} f_j

    A baseline that hangs on other, independent draws leaves the score-function gradient unbiased.

    Args:
        signal: ``(num_draws, batch)``; as it is with one draw.
    """
    count = len(signal)
    if count == 1:
        return signal
    return (signal - signal.mean(dim=0)) * (count / (count - 1))
