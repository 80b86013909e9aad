"""A fitted scaling law: parameters, intervals, what is identified, and its predictions."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from beyond_outliers.scaling.least_squares import FULL_PRECISION


class IdentificationWarning(UserWarning):
    """The runs do not determine a parameter of the scaling law."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. `intervals` and `identified` mirror `parameters`, with one entry "rho" that is a dict by bits.

    parameters: A, alpha, E (and B, beta). rho: by bits, 1 at 16. intervals: (low, high). identified: False where the
    runs leave a parameter open; `warnings` says why, in words. objective: the Huber loss; n: the number of runs.
    """

    form: str
    parameters: dict[str, float]
    rho: dict[float, float]
    intervals: dict = field(repr=False)
    identified: dict
    warnings: list[str]
    objective: float
    n: int

    def predict(self, N, D=None, bits=FULL_PRECISION) -> np.ndarray:
        """Loss in nats per token; N, D and bits broadcast; ValueError for bits without a rho, or no D in "full"."""
        unknown = sorted(set(np.unique(bits).tolist()) - set(self.rho))
        if unknown:
            raise ValueError(f"no rho was fitted for bits {unknown}; fitted: {sorted(self.rho)}")
        p, bits = self.parameters, np.asarray(bits)
        rho = np.select([bits == b for b in self.rho], list(self.rho.values()))
        loss = p["A"] / (np.asarray(N, dtype=float) * rho) ** p["alpha"] + p["E"]
        if self.form == "full":
            if D is None:
                raise ValueError('the form "full" needs D, the number of training tokens')
            loss = loss + p["B"] / np.asarray(D, dtype=float) ** p["beta"]
        return loss

    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, bits (rho only), value, low, high, identified."""
        rows: list[tuple] = [
            (name, None, value, self.intervals[name], self.identified[name]) for name, value in self.parameters.items()
        ]
        rows += [
            ("rho", bits, value, self.intervals["rho"][bits], self.identified["rho"][bits])
            for bits, value in self.rho.items()
        ]
        return pd.DataFrame(
            [(name, bits, value, *interval, found) for name, bits, value, interval, found in rows],
            columns=["parameter", "bits", "value", "low", "high", "identified"],
        )
