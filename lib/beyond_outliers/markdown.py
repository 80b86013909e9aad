"""HTML tables, as pandas writes them, as Markdown tables that code hosts render."""

import html.parser

NONE = "-"  # where pandas writes nan or NaN: there is no such number


class _Table(html.parser.HTMLParser):
    """The cells of the first HTML table: rows of strings, spans filled in with repetitions left empty, links kept."""

    def __init__(self):
        super().__init__()
        self.rows: list[list[str]] = []
        self.heads = 0
        self.caption = ""
        self._cell: list[str] | None = None
        self._target = ""  # of the link that is open
        self._span = (1, 1)
        self._below: dict[int, int] = {}  # column -> rows that a cell above still covers
        self._in_caption = self._in_head = False

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        if tag == "tr":
            self.rows.append([])
            self.heads += self._in_head
        elif tag in ("td", "th"):
            self._fill()
            self._cell, self._span = [], (int(of.get("rowspan", 1)), int(of.get("colspan", 1)))
        elif tag in ("a", "code") and self._cell is not None:
            self._target = of.get("href", "") if tag == "a" else self._target
            self._cell.append("[" if tag == "a" else "`")
        elif tag == "caption":
            self._in_caption = True
        elif tag == "thead":
            self._in_head = True

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            rows, columns = self._span
            text = " ".join("".join(self._cell).split())
            text = NONE if text.lower() == "nan" else text
            for i in range(columns):
                if rows > 1:
                    self._below[len(self.rows[-1])] = rows - 1
                self.rows[-1].append(text if i == 0 or self._in_head else "")  # a heading stands over all it spans
            self._cell = None
            self._fill()
        elif tag in ("a", "code") and self._cell is not None:
            self._cell.append(f"]({self._target})" if tag == "a" else "`")
        elif tag == "caption":
            self._in_caption = False
        elif tag == "thead":
            self._in_head = False

    def _fill(self):
        while self._below.get(len(self.rows[-1]), 0):
            self._below[len(self.rows[-1])] -= 1
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)
        elif self._in_caption:
            self.caption += data


def markdown_table(source: str) -> str:
    """A Markdown table of the first table in `source` (HTML, as pandas writes it); ValueError if there is none.

    A table without rows becomes a sentence that says so.
    """
    table = _Table()
    table.feed(source)
    rows = [row for row in table.rows if row]
    if not rows:
        raise ValueError("there is no table in this HTML output")
    width = max(map(len, rows))
    rows = [[cell.replace("|", "\\|") for cell in row] + [""] * (width - len(row)) for row in rows]
    heads, body = rows[: max(1, table.heads)], rows[max(1, table.heads) :]
    heading = _one_row(heads)
    lines = [heading, ["---"] * width, *body]
    if not any(any(row) for row in body):
        return f"*No rows yet ({', '.join(heading)}): nothing of this has been measured.*\n"
    caption = f"*{table.caption.strip()}*\n\n" if table.caption.strip() else ""
    return caption + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _one_row(heads: list[list[str]]) -> list[str]:
    """One heading a column, which is what Markdown has, of the rows that pandas writes.

    A row a level of the columns, with the level's name before its labels, then one with the names of the index. The
    names of the index stay. A level's name stays only before a number, which would say nothing alone ("seed 0").
    """
    names = heads[-1]
    n_index = names.index("") if "" in names else 0  # beyond the index, the row of its names is blank
    levels = [row[n_index - 1] if n_index else "" for row in heads]
    columns = list(zip(*heads, strict=True))[n_index:]
    named = [[_named(label, level) for label, level in zip(column, levels, strict=True)] for column in columns]
    return names[:n_index] + [" ".join(dict.fromkeys(filter(None, labels))) for labels in named]


def _named(label: str, level: str) -> str:
    return f"{level} {label}".strip() if label.replace(".", "", 1).isdigit() else label
