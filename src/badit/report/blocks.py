"""What a page is made of: sections of figures, tables, cards and notes, as plain values that the template lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from badit.report.wording import number

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True)
class Origin:
    """The file that numbers come from: its path below the folder of a run, and the run where there are several."""

    file: str
    run: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart.

    Args:
        key: its name in the page and, exported, its file's.
        alt: what it shows, for those who cannot see it.
        caption: how to read it.
        width: the share of the text's width that it takes: "half" stands beside another, "square" suits matrices.
        run: the run that it is of, where there are several.
    """

    kind: ClassVar[str] = "figure"
    key: str
    title: str
    chart: alt.TopLevelMixin
    alt: str
    caption: str
    origins: Sequence[Origin]
    width: Literal["full", "half", "square"] = "full"
    run: str = ""


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, the number that it is sorted by, and what a pointer resting on it is shown."""

    text: str
    value: float | None = None
    hint: str = ""
    strong: bool = False

    @classmethod
    def of(cls, value: float | None, digits: int = 1, *, unit: str = "", strong: bool = False) -> Cell:
        """A number, shown with so many decimals."""
        return cls(number(value, digits, unit=unit), value, strong=strong)


@dataclass(frozen=True)
class Table:
    """A sortable table whose first column names the row; the footer is a row that stays below."""

    kind: ClassVar[str] = "table"
    key: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    origins: Sequence[Origin]
    footer: Sequence[Cell] = ()
    notes: Sequence[str] = ()
    run: str = ""


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    value: str
    name: str


@dataclass(frozen=True)
class Summary:
    """A run at a glance."""

    kind: ClassVar[str] = "summary"
    title: str
    text: str
    tiles: Sequence[Tile]
    origins: Sequence[Origin]


@dataclass(frozen=True)
class Finding:
    """One sentence that the numbers support, and where they are from."""

    text: str
    origins: Sequence[Origin]


@dataclass(frozen=True)
class Findings:
    kind: ClassVar[str] = "findings"
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Heading:
    """The run that the blocks below it belong to, in a report on several."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Note:
    """A line of text, and perhaps a command to run."""

    kind: ClassVar[str] = "note"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Card:
    """An expert: what it does in a sentence, its numbers, and the prompts that draw on it most."""

    title: str
    text: str
    facts: Mapping[str, str]
    prompts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    kind: ClassVar[str] = "cards"
    title: str
    cards: Sequence[Card]
    caption: str
    origins: Sequence[Origin]
    run: str = ""


@dataclass(frozen=True)
class Answer:
    """A model's answer, and what it scores."""

    run: str
    text: str
    verdict: Literal["right", "partly right", "wrong"]
    score: str


@dataclass(frozen=True)
class Sample:
    """An instance with its references and everybody's answers."""

    question: str
    references: Sequence[str]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Samples:
    """Instances by task, of which the reader chooses one; ``tasks`` has the full names and the short ones."""

    kind: ClassVar[str] = "samples"
    tasks: Mapping[str, Sequence[Sample]]
    names: Mapping[str, str]
    caption: str
    origins: Sequence[Origin]


@dataclass(frozen=True)
class Details:
    """Text that is folded away until it is asked for."""

    kind: ClassVar[str] = "details"
    title: str
    text: str
    origins: Sequence[Origin]


Block = Figure | Table | Summary | Findings | Heading | Note | Cards | Samples | Details


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    lead: str
    blocks: Sequence[Block] = field(default_factory=list)
