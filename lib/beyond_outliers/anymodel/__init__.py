"""Models that are not ours: what of them can be rounded, what a pass shows of them, and `probe`."""

from beyond_outliers import lazily

__getattr__, __all__ = lazily(
    __name__,
    coverage="coverage",
    open="open_layers",
    probe="Probe bundled_encoder load windows",
    probes="Probes estimate probe_all",
    save="load_quantized save_quantized",
)
