"""`from beyond_outliers.probe import probe`: your checkpoint under quantization, see `anymodel.probe`."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    "beyond_outliers",
    **{
        "anymodel.loading": "bundled load windows",
        "anymodel.probe": "Probe probe",
        "anymodel.probes": "Probes probe_all",
        "anymodel.sensitivity": "ablate recommend",
    },
)
