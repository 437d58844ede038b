"""The tables on the pages of ``docs/results/``, rendered from the JSON files in ``docs/measurements/``.

``python benchmarks/results.py`` rewrites the pages; ``--check`` changes nothing and fails where a page differs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

DOCS = Path(__file__).resolve().parent.parent / "docs"
GOALS = "goals"
_BLOCK = re.compile(r"(<!-- (table|goals)\b(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
_OPTIONS = ("columns", "rows", "notes")

Cell = bool | int | float | str | list[int | float | str] | None


class ResultsError(Exception):
    """A page or a file of measurements cannot be rendered; the message names it and the reason."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Strict):
    """A column: its heading, and the format specification of its numbers (default: four significant digits)."""

    name: str
    format: str | None = None


class Table(_Strict):
    """One measurement. A field that was not recorded is ``None``."""

    title: str
    command: str | None
    data: str | None
    seed: int | None
    machine: str | None
    date: str | None
    commit: str | None
    environment: dict[str, str] | None = None
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = []

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name: {names}")
        for number, row in enumerate(self.rows):
            if len(row) != len(names):
                raise ValueError(f"row {number} has {len(row)} cells for {len(names)} columns: {row}")
        return self

    @classmethod
    def of_records(
        cls, records: Sequence[Mapping[str, Any]], formats: Mapping[str, str] | None = None, **fields: Any
    ) -> Table:
        """Build a table from one mapping for each row; a column that a row lacks is ``None`` there.

        A column whose name ends in ``%`` has two digits after the point unless ``formats`` says otherwise.
        """
        names = list(dict.fromkeys(name for record in records for name in record))
        given = {name: ".2f" for name in names if name.endswith("%")} | dict(formats or {})
        columns = [Column(name=name, format=given.get(name)) for name in names]
        return cls(columns=columns, rows=[[record.get(name) for name in names] for record in records], **fields)

    @classmethod
    def read(cls, file: Path) -> Table:
        """Read a file of measurements."""
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ResultsError(f"{file} does not exist") from None
        except ValidationError as error:
            raise ResultsError(f"{file}: {error}") from None

    def write(self, file: Path) -> None:
        """Write a file of measurements, one line for each row, so that a change reads well in a diff."""
        head = self.model_dump(exclude={"columns", "rows", "notes"}, exclude_unset=True)
        lines = [f"{json.dumps(key)}: {_json(value)}" for key, value in head.items()]
        columns = [column.model_dump(exclude_none=True) for column in self.columns]
        lines += [_list("columns", columns), _list("rows", self.rows)]
        lines += [_list("notes", self.notes)] if self.notes else []
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")

    def records(self) -> list[dict[str, Cell]]:
        """Return one mapping from column name to cell for each row."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def position(self, name: str) -> int:
        """Return the index of a column."""
        names = [column.name for column in self.columns]
        if name not in names:
            raise ResultsError(f"{self.title!r} has no column {name!r}; its columns are {', '.join(names)}")
        return names.index(name)

    def select(self, names: Sequence[str], wanted: Mapping[str, Sequence[str]]) -> Table:
        """Keep these columns (all if empty) of the rows whose cells, as rendered, are among those wanted."""
        rows = self.rows
        for name, texts in wanted.items():
            at = self.position(name)
            seen = {self.text(at, row[at]) for row in rows}
            if absent := set(texts) - seen:
                raise ResultsError(f"{self.title!r} has no row with {name!r} = {sorted(absent)}; it has {sorted(seen)}")
            rows = [row for row in rows if self.text(at, row[at]) in texts]
        kept = [self.position(name) for name in names] or list(range(len(self.columns)))
        return self.model_copy(
            update={"columns": [self.columns[at] for at in kept], "rows": [[row[at] for at in kept] for row in rows]}
        )

    def text(self, at: int, cell: Cell) -> str:
        """Return a cell of a column as the page shows it."""
        return text(cell, self.columns[at].format)

    def markdown(self) -> str:
        """Render the table in Markdown."""
        texts = [[self.text(at, cell) for at, cell in enumerate(row)] for row in self.rows]
        # A column of numbers is set flush right.
        rules = ["---:" if all(_is_number(row[at]) for row in self.rows) else "---" for at in range(len(self.columns))]
        return _markdown([column.name for column in self.columns], rules, texts)

    def provenance(self) -> str:
        """Render the sentence about the numbers' provenance; fields that were not recorded are left out."""
        known = {
            "Command": self.command and f"`{self.command}`",
            "Data": self.data,
            "Seed": self.seed,
            "Machine": self.machine,
            "Date": self.date,
            "Commit": self.commit,
        }
        return " ".join(f"{name}: {value}." for name, value in known.items() if value is not None)


class Goal(_Strict):
    """A goal, and the cells that show whether it was reached.

    Args:
        goal: The goal in words.
        page: The page with the measurement, or ``None``.
        tables: Files of measurements, without ``.json``.
        column: Column of these tables.
        rows: Filter of rows, by column name and rendered cells.
        at_least: Lower bound for each cell.
        at_most: Upper bound for each cell.
        unit: Text after the numbers.
        reached: Text to show if no cell gives the result.
        verdict: Text to show if there is no bound.
    """

    goal: str
    page: str | None
    tables: list[str] = []
    column: str | None = None
    rows: dict[str, list[str]] = {}
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    reached: str | None = None
    verdict: str | None = None

    def row(self, table: Callable[[str], Table]) -> list[str]:
        """Render the goal, its bound, the result, the verdict and the page."""
        bounds = [
            f"{word} {bound:g}{self.unit}"
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bound is not None
        ]
        page = f"[{self.page.removesuffix('.md').replace('-', ' ')}]({self.page})" if self.page else "–"
        return [self.goal, ", ".join(bounds) or "–", *self._reached(table), page]

    def _reached(self, table: Callable[[str], Table]) -> tuple[str, str]:
        if self.column is None:
            return self.reached or "not run", self.verdict or "–"
        cells: list[tuple[float, str]] = []
        for name in self.tables:
            some = table(name).select([self.column], self.rows)
            for (cell,) in some.rows:
                if cell is None:  # not measured
                    continue
                if not _is_number(cell) or isinstance(cell, (str, list)):
                    raise ResultsError(f"goal {self.goal!r}: {cell!r} in {name} is no number")
                cells.append((cell, some.text(0, cell)))
        if not cells:
            return "not run", "–"
        (_, lowest), (_, highest) = min(cells), max(cells)
        reached = lowest if lowest == highest else f"{lowest} – {highest}"
        return reached + self.unit, self.verdict or self._met([value for value, _ in cells])

    def _met(self, values: list[float]) -> str:
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        if (low, high) == (-float("inf"), float("inf")):
            return "–"
        met = sum(low <= value <= high for value in values)
        if met in (0, len(values)):
            return "yes" if met else "no"
        return f"{met} of {len(values)}"


class _Goals(_Strict):
    goals: list[Goal]


@dataclass
class Results:
    """The measurements and the pages of one documentation folder."""

    docs: Path = DOCS
    used: set[str] = field(default_factory=set)
    _tables: dict[str, Table] = field(default_factory=dict)

    @property
    def pages(self) -> list[Path]:
        """Return all pages of results."""
        return sorted((self.docs / "results").glob("*.md"))

    @property
    def names(self) -> set[str]:
        """Return the names of all files of measurements, without ``.json``."""
        return {file.stem for file in (self.docs / "measurements").glob("*.json")}

    def table(self, name: str) -> Table:
        """Read ``docs/measurements/NAME.json``, once."""
        self.used.add(name)
        if name not in self._tables:
            self._tables[name] = Table.read(self.docs / "measurements" / f"{name}.json")
        return self._tables[name]

    def goals(self) -> str:
        """Render ``docs/measurements/goals.json``."""
        self.used.add(GOALS)
        file = self.docs / "measurements" / f"{GOALS}.json"
        try:
            goals = _Goals.model_validate_json(file.read_text(encoding="utf-8")).goals
        except ValidationError as error:
            raise ResultsError(f"{file}: {error}") from None
        heads = ["goal", "limit", "reached", "met", "page"]
        return _markdown(heads, ["---"] * len(heads), [goal.row(self.table) for goal in goals])

    def rendered(self, page: Path) -> str:
        """Return the text of a page with each block between its markers rendered again."""

        def block(match: re.Match[str]) -> str:
            opening, kind, options, _, closing = match.groups()
            try:
                body = self.goals() if kind == "goals" else self._block(options)
            except ResultsError as error:
                raise ResultsError(f"{page.name}: {error}") from None
            return f"{opening}\n{body}\n\n{closing}"

        text = page.read_text(encoding="utf-8")
        if (opened := len(re.findall(r"<!-- (?:table|goals)\b", text))) != len(_BLOCK.findall(text)):
            raise ResultsError(f"{page.name}: {opened} blocks are opened, and not each has an <!-- end -->")
        return _BLOCK.sub(block, text)

    def _block(self, text: str) -> str:
        """Render a table. Lines after ``table: NAME`` are ``columns: A | B``, ``rows: A = x | y``, ``notes: yes``.

        By default, notes are rendered only under a whole table, because they may concern rows that a selection lacks.
        """
        first, *lines = [line.strip() for line in text.strip().removeprefix(":").strip().splitlines()]
        table, columns, rows, noted = self.table(first), list[str](), dict[str, list[str]](), len(lines) == 0
        for line in lines:
            option, _, value = line.partition(":")
            if option == "columns":
                columns = _parts(value)
            elif option == "rows":
                name, _, texts = value.partition("=")
                rows[name.strip()] = _parts(texts)
            elif option == "notes":
                noted = value.strip() == "yes"
            else:
                raise ResultsError(f"{option!r} is no option of a table: use {', '.join(_OPTIONS)}")
        parts = [table.select(columns, rows).markdown(), table.provenance()]
        if noted:
            parts.append("\n".join(f"- {note}" for note in table.notes))
        return "\n\n".join(filter(None, parts))


def text(cell: Cell, form: str | None = None) -> str:
    """Return a cell as a page shows it: – for ``None``, a range for a list."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, list):
        return " – ".join(text(part, form) for part in cell)
    if isinstance(cell, str):
        return cell.replace("|", "\\|")
    number = format(cell, form or ("," if isinstance(cell, int) else ".4g"))
    return f"−{number[1:]}" if number.startswith("-") else number


def differences(results: Results) -> Iterator[tuple[Path, str]]:
    """Yield each page that differs from its measurements, with the text that it should have."""
    for page in results.pages:
        rendered = results.rendered(page)
        if rendered != page.read_text(encoding="utf-8"):
            yield page, rendered


def _is_number(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))


def _parts(value: str) -> list[str]:
    return [part.strip() for part in value.split("|")]


def _markdown(heads: Sequence[str], rules: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _list(name: str, entries: Sequence[object]) -> str:
    return f"{_json(name)}: [\n  " + ",\n  ".join(map(_json, entries)) + "\n ]"


def main(
    check: Annotated[bool, typer.Option("--check", help="change nothing; exit with 1 if a page differs")] = False,
    docs: Annotated[Path, typer.Option(help="the documentation folder")] = DOCS,
) -> None:
    """Rewrite the tables on the pages of docs/results/ from docs/measurements/."""
    results = Results(docs)
    try:
        changed = list(differences(results))
    except ResultsError as error:
        sys.exit(f"error: {error}")
    for page, rendered in changed:
        print(f"{page.name}: {'differs from the measurements' if check else 'rewritten'}")
        if not check:
            page.write_text(rendered, encoding="utf-8")
    if unused := results.names - results.used:
        print(f"on no page: {', '.join(sorted(unused))}")
    if check and (changed or unused):
        sys.exit("error: run `make results`" if changed else "error: show each file of measurements on a page")


if __name__ == "__main__":
    typer.run(main)
