"""Scaling laws with a parameter efficiency for every precision."""

from beyond_outliers.scaling.fit import (
    IdentificationWarning,
    ScalingLaw,
    compare_forms,
    fit_scaling_law,
    fit_shared,
    log_rho_draws,
)

__all__ = ["IdentificationWarning", "ScalingLaw", "compare_forms", "fit_scaling_law", "fit_shared", "log_rho_draws"]
