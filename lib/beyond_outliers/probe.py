"""`from beyond_outliers.probe import probe`: a checkpoint of your own under quantization, see `anymodel.probe`."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    "beyond_outliers",
    **{
        "anymodel.probe": "Probe bundled_encoder load probe windows",
        "anymodel.probes": "Probes estimate probe_all",
    },
)
