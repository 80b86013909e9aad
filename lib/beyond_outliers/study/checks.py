"""What can be known of a scale before it trains for hours: what would stop it, from its text to its hyperparameters."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from beyond_outliers import paths
from beyond_outliers.config.parsing import choose
from beyond_outliers.config.protocol import Protocol


def check(protocol: Protocol) -> None:
    """ValueError now for what would stop the study later: a text, format, scheme or hyperparameter."""
    from beyond_outliers.corpus.sources import READERS
    from beyond_outliers.model.olmo2 import Olmo2, Olmo2Config
    from beyond_outliers.optimizers.registry import build_optimizer
    from beyond_outliers.quantizers.spec import QuantSpec
    from beyond_outliers.study.measure import specs

    settings = protocol.settings
    if settings.rates_from and not settings.rates:
        raise ValueError(f"{settings.rates_from} has chosen no rates yet for {protocol.scale}: tune it first")
    source, measured = protocol.corpus.source, protocol.measure
    with _named(protocol, "corpus"):
        for wheel in protocol.corpus.wheels:
            choose("wheel", wheel, READERS)
        if source not in ("embedded", "climbmix") and not Path(source).exists():
            raise ValueError(f"source: there is no file or folder {source!r}; valid: embedded, climbmix, or a path")
    with _named(protocol, "measure.specs" if measured.specs else "measure.formats"):
        valid = {spec.name: spec for spec in specs(measured)}
        for size in protocol.sizes:
            shape = protocol.model(size)
            # specs that a scale names are left out at sizes whose widths they do not divide; the primary never
            asked = [valid[measured.primary]] if measured.specs and measured.primary in valid else valid.values()
            for spec in (*asked, *map(QuantSpec.named, measured.readings or ())):
                for width in (shape.width, shape.mlp_ratio * shape.width):  # what the linear layers take in
                    spec.check_width(width)
    with _named(protocol, "measure.primary"):
        choose("spec", measured.primary, valid)
    model = Olmo2(Olmo2Config(vocab_size=4, width=4, depth=1, n_heads=1))
    for name, given in settings.hyper.items():
        with _named(protocol, f"hyper.{name}"):
            build_optimizer(model, name, lr=1e-3, **given)


@contextlib.contextmanager
def _named(protocol: Protocol, key: str) -> Iterator[None]:
    """Puts the scale file and the key before the message of a ValueError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{paths.SCALES / protocol.scale}.toml: {key}: {error}") from None
