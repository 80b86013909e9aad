"""The terms that a reader of one page may not know, in a line each; data/README.md has them in full."""

import re

IN_FULL = "data/README.md#terms"  # relative to the repository
TERMS = {
    "PTQ": "post-training quantization, rounding a trained model to few bits without further training",
    "W4A4": "weights and activations (inputs of linear layers) rounded to 4-bit integers (`+head`: the head, too)",
    "QAT": "quantization-aware training, with weights and activations rounded at every step",
    "Common Loss": "the lowest validation loss that all optimizers reach, per size or per size and seed; each is "
    "compared at its first checkpoint that reaches it",
    "MMR": "max-to-median ratio of a layer's input, mean over tokens of max|x| / median|x|: a measure of outliers",
    "R_L": "relative squared error of the quantized model's output, ||hq - h||^2 / ||h||^2",
}


def used(text: str) -> list[str]:
    """Terms that a text uses, in the order in which it uses them first."""
    places = {term: re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text) for term in TERMS}
    found = {term: place.start() for term, place in places.items() if place}
    return sorted(found, key=lambda term: found[term])


def explained(text: str) -> str:
    """Markdown: a line that defines every term which a notebook's text uses; empty where it uses none."""
    definitions = [f"**{term}**: {TERMS[term]}" for term in used(text)]
    return f"Terms ([in full](../{IN_FULL})). {'. '.join(definitions)}." if definitions else ""
