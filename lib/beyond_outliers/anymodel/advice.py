"""What `probe` and `compare_guides` found, in words: what is lost, where, and what to do about it."""

import math
from typing import Any

import pandas as pd

from beyond_outliers.anymodel.sensitivity import bits_of
from beyond_outliers.propagation.output_error import TRUSTED


def interval(row: pd.Series) -> str:
    return f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]"


def finding(found: Any) -> str:
    """What is lost, in a plain sentence and some with numbers. found: a `Probe`."""
    of, rows = f"{found.name} in {found.spec.name}", found.readings
    few = f" Only {rows.n.iloc[0]} sequences were read: the intervals are guesses."
    few = few if rows.n.iloc[0] < TRUSTED else ""
    if found.unit == "R_L":
        size = "little" if rows.value["R_L"] < 0.05 else "much"
        return f"The answers of {of} move {size}. The relative squared error R_L is {interval(rows.loc['R_L'])}.{few}"
    loss = rows.loc["increase"]
    verdict = "may predict text as before" if loss.low <= 0 <= loss.high else "predicts text worse"
    verdict = "predicts text better" if loss.high < 0 else verdict
    text = (
        f"{of} {verdict}. The loss changes by {interval(loss)} nats per token. Perplexity is multiplied by "
        f"{math.exp(loss.value):.3g}. KL is {interval(rows.loc['kl'])} nats per token. The likeliest word stays for "
        f"{rows.value['top1_agreement']:.0%} of the tokens."
    )
    if found.held_out is not None:
        text += f" On held-out documentation the loss changes by {interval(found.held_out.loc['increase'])}."
    return text + few


def advice(found: Any) -> list[str]:
    """One line for each thing to know or to do."""
    return [line for line in (_grid(found), _where(found), _keep(found), _outliers(found), _left(found)) if line]


def _grid(found: Any) -> str:
    if not found.grids:
        return ""
    return (
        f"The weights of {found.grids} layers already lie on at most 16 levels per block. They were quantized before, "
        "so that the damage comes on top."
    )


def _where(found: Any) -> str:
    worst = found.worst(3)
    names = ", ".join(f"`{name}`" for name in worst.name)
    return f"Of all {len(found.layers)} layers, these add {worst.share.sum():.0%} of the damage: {names}."


def _keep(found: Any) -> str:
    if found.kept is None:
        return ""
    before, after = found.readings.value[found.unit], found.kept.value[found.unit]
    worst, low = found.worst(3), bits_of(found.spec)
    bits = low + (8 - low) * worst.entries.sum() / found.layers.entries.sum()
    change = f"{found.unit.replace('kl', 'KL')} goes from {before:.3g} to {after:.3g}. The average is {bits:.2f} bits."
    if after > 0.9 * before:
        return f"Single layers are not the answer. With these in 8 bits {change} Use more bits for all, or GPTQ."
    return f"Keep these layers in 8 bits. {change}"


def _outliers(found: Any) -> str:
    layers = found.layers.dropna(subset=["mmr_mean"])  # medians are near zero after ReLU
    if layers.empty:
        return ""
    most = layers.loc[layers.mmr_mean.idxmax()]
    text = f"The largest outliers enter `{most['name']}`: a token has entries {most.mmr_mean:.0f} times their mean."
    if "input_error_rotated" not in layers:
        return text
    before, after = most.input_error, most.input_error_rotated
    helps = "removes most of them" if after < before / 2 else "helps a little" if after < 0.9 * before else "is no help"
    means = [f"{layers[column].mean():.2g}" for column in ("input_error", "input_error_rotated")]
    return (
        f"{text} Rotation (`+rot`) {helps}. The rounding error of this input goes from {before:.2g} to {after:.2g}. "
        f"The average over layers goes from {means[0]} to {means[1]}."
    )


def _left(found: Any) -> str:
    left = [f"`{w.name}`, {w.reason}" for w in found.quantization.weights if not w.rounded]
    more = f"; and {len(left) - 4} more" if len(left) > 4 else ""
    return f"Not quantized: {'; '.join(left[:4])}{more}." if left else "All matrix-multiply weights were quantized."


def on_guides(table: pd.DataFrame, budget: float = 4.5, rival: str = "kurtosis") -> str:
    """Whether propagation or outliers tell better where bits are needed, of rows of `compare_guides` with model labels.

    Medians over checkpoints.
    """
    kl = table[table.reading == "kl"].pivot_table(
        index=["model", "optimizer"], columns=["guide", "bits"], values="value"
    )
    kl = kl.div(kl["uniform", 4], axis=0)
    ranks = table[table.reading == "rank correlation"]
    ranks = ranks.pivot_table(index=["model", "optimizer"], columns="guide", values="value")
    ahead, n = int((ranks.carried > ranks[rival]).sum()), len(ranks)
    saves = int((kl["carried", budget] < kl[rival, budget]).sum())
    left = kl.median().map("{:.0%}".format)
    verdicts = (
        f"Propagation is no better guide than {rival}",
        "The two tests disagree",
        "Propagation is the better guide",
    )
    verdict = verdicts[(ahead > n / 2) + (saves > n / 2)]
    text = (
        f"{verdict}. The rank correlation with ablation is {ranks.carried.median():.2f} for propagation and "
        f"{ranks[rival].median():.2f} for {rival}. Propagation is ahead on {ahead} of {n}. At {budget:g} bits, "
        f"propagation leaves {left['carried', budget]} of the damage. Under {rival}, {left[rival, budget]} is left, "
        f"and under ablation {left['ablation', budget]}. A random order leaves {left['random', budget]}. Propagation "
        f"leaves less than {rival} on {saves} of {n}."
    )
    if ("any width", 5.0) in left:
        text += (
            f" At 5 bits, all layers alike leave {left['uniform', 5.0]}. Propagation leaves {left['any width', 5.0]} "
            f"where layers may have any width. With the two widths alone, {left['carried', 5.0]} would be left."
        )
    return text
