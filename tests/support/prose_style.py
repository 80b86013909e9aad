"""Sentences of Markdown, and what is wrong with them by the rules of style: lengths, numbers, brackets, words."""

import re

LONGEST, AVERAGE, NUMBERS, BRACKETS = 25, 17, 2, 1
UNITS = "nats|bits|seconds|milliseconds|ms|runs?|points?|rows?|lines?|bars?|scale|panel|step|time|tokens"
OF = "token|run|size|optimizer|row|step|seed|byte|device|module|kind|quantity|claim|job|layer|head|parameter"
FORBIDDEN = {
    rf"\b({UNITS}) an? ({OF})\b": "'per', not 'a'",
    r"\b(wings?|mend\w*|said|holding|luck|beside|house|rooms?|together|opened)\b": "a private word",
    r"\b(own|ours?elves)\b": "'own'",
    r"\bgo(es)? with\b|\bstands? beside\b|\bdid, too\b": "a figure of speech",
    r"\bvectoris|\bnormalis|\boptimis|\bquantis|\bbehaviour\b": "British spelling",
}


def plain(text: str) -> str:
    """A paragraph without what is not read as words: links' targets, code, formulas, intervals, dates, emphasis."""
    text = re.sub(r"<!--.*?-->|<[^>]+>", " ", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "Code", text)
    text = re.sub(r"\[[^\]]*\]", "", text)  # an interval follows its number
    text = re.sub(r"\b20\d\d-\d\d(-\d\d)?\b|\barXiv [\d.]+", "date", text)
    text = re.sub(r"\b\d[\d.]*M\b", "Size", text)
    return re.sub(r"[*_]{1,3}", "", text)


def paragraphs(text: str) -> list[str]:
    """Running text: no code blocks, tables, headings, or lists' marks; an item of a list is a paragraph."""
    text = re.sub(r"```.*?```|<details>.*?</details>|<!-- made of.*?-->", "", text, flags=re.S)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    kept = []
    for part in parts:
        lines = [line for line in part.splitlines() if not line.lstrip().startswith(("|", "#", "!["))]
        if words := plain(re.sub(r"^\s*(?:[-*]|\d+\.) ", "", "\n".join(lines))).strip():
            kept.append(words)
    return kept


def sentences(paragraph: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z0-9])", " ".join(paragraph.split())) if s]


def wrong(text: str) -> list[str]:
    """One line per sentence or paragraph that breaks a rule."""
    found = []
    for paragraph in paragraphs(text):
        lengths = []
        for sentence in sentences(paragraph):
            words = re.findall(r"[A-Za-z][\w'+-]*", sentence)
            lengths.append(len(words))
            numbers = re.findall(r"(?<![\w.^-])[-+]?\.?\d[\d.,]*(?![\w-])", sentence)
            for count, most, what in (
                (len(words), LONGEST, "words"),
                (len(numbers), NUMBERS, "numbers"),
                (len(re.findall(r"\((?![^)]*$)", sentence)), BRACKETS, "brackets"),
            ):
                if count > most:
                    found.append(f"{count} {what}: {sentence}")
            found += [f"{why}: {sentence}" for pattern, why in FORBIDDEN.items() if re.search(pattern, sentence, re.I)]
        if len(lengths) > 1 and sum(lengths) / len(lengths) >= AVERAGE:
            found.append(f"{sum(lengths) / len(lengths):.0f} words on average: {paragraph[:80]}")
    return found
