"""What ran how, and why: in words."""

from __future__ import annotations

from dataclasses import dataclass


class CompileWarning(UserWarning):
    """Something keeps a step from being compiled; it runs eagerly, and is right, but slower."""


@dataclass(frozen=True)
class Signature:
    """How the steps of one signature ran.

    Attributes:
        arguments: Shapes and dtypes of the arguments, in words.
        tier: How the next step runs: ``"eager"``, ``"replayed graph"``, ``"compiled"``, or one of
            the last two ``"in a CUDA graph"``.
        why: Why it is that tier, in words.
        steps: Steps taken, by tier.
        step_seconds: Mean seconds of a step, by tier; on a GPU of its launch. Where no eager step
            was timed it is what its loss and gradients took when the graph was checked.
        capture_seconds: Spent on capturing and checking the graph.
        compile_seconds: Spent on compiling and checking.
        operations: Operations of the captured graph, 0 where there is none.
        products: Matrix products that go another way, as that was measured to be faster.
    """

    arguments: str
    tier: str
    why: str
    steps: dict[str, int]
    step_seconds: dict[str, float]
    capture_seconds: float
    compile_seconds: float
    operations: int
    products: int

    @property
    def pays_after(self) -> float | None:
        """Steps after which capturing and compiling have paid for themselves.

        `None` where nothing is saved, or no eager step was timed.
        """
        if "eager" not in self.step_seconds or self.tier not in self.step_seconds:
            return None
        saved = self.step_seconds["eager"] - self.step_seconds[self.tier]
        spent = self.capture_seconds + self.compile_seconds
        return spent / saved if saved > 0 and self.tier != "eager" else None

    def __str__(self) -> str:
        lines = [f"{self.arguments}: {self.tier}. {self.why}"]
        for tier, count in self.steps.items():
            each = (
                f", {self.step_seconds[tier] * 1e6:,.0f} µs each"
                if tier in self.step_seconds
                else ""
            )
            lines.append(f"  {tier}: {count} steps{each}")
        if self.operations:
            spent = f"capturing {self.capture_seconds:.2g} s"
            if self.compile_seconds:
                spent += f", compiling {self.compile_seconds:.2g} s"
            lines.append(f"  {self.operations} operations; {spent}")
        if self.products:
            lines.append(f"  {self.products} matrix products another way, measured to be faster")
        if self.pays_after is not None:
            lines.append(f"  has paid after {self.pays_after:,.0f} steps")
        return "\n".join(lines)


@dataclass(frozen=True)
class CompileReport:
    """How steps ran, for each signature of their arguments.

    Attributes:
        signatures: One for each.
    """

    signatures: tuple[Signature, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self.signatures)) or "no step was taken"
