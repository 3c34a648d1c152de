"""What a measurement is: one class in one file of ``measurements/``. No torch.

The runner, the tables, the report, ``bench compare``, the command line and the recipe's list of measurements are made
from the files in that folder. To add a measurement, add a file with one subclass of :class:`Measurement`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

from sentcompress.recipe.sections import measurement_names
from sentcompress.table import Figure, Table
from sentcompress.training.run_folder import BASELINE, GRAFT, OPPONENT

if TYPE_CHECKING:
    from rich.console import Console

    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench

Report = TypeVar("Report")
"""What is written to ``results.json``: a pydantic model or None, or a list of models."""
SENTENCE_MODEL = "sentence model"
WITHOUT_LLM = "sentence model, without its LLM"
"""The same, with a constant in the place of the LLM's states."""
BASELINES = ("baseline, equal data", "backbone, as it came")
"""Systems the sentence model is compared with, in the order in which they are preferred."""
OPPONENT_SYSTEM = "opponent "
"""What the names of the recipe's opponents begin with, as systems."""


def stage_of(system: str) -> str | None:
    """The stage that a system was last trained in; None for what no stage trained."""
    if system.startswith(OPPONENT_SYSTEM):
        return OPPONENT + system.removeprefix(OPPONENT_SYSTEM)
    return {SENTENCE_MODEL: GRAFT.name, BASELINES[0]: BASELINE.name}.get(system)


@dataclass(frozen=True)
class Flag:
    """An option of ``sentcompress bench NAME`` whose value has to be turned into fields of the ``bench`` section.

    A field that can be set as it is belongs in :attr:`Measurement.options`.

    Attributes:
        field: of ``bench`` that it sets.
        settings: turns the option's value into fields of ``bench`` and their values; None passes the value on.
        type: of the value; ``list[str]`` makes the option repeatable.
        in_all: ``bench all`` has the option too.
        recorded: results are those of the changed recipe; otherwise the option holds for one call, and the results
            stay those of the folder's recipe.
    """

    name: str
    field: str
    help: str
    settings: Callable[[Any], dict[str, Any]] | None = None
    type: Any = str
    metavar: str | None = None
    in_all: bool = False
    recorded: bool = True


@dataclass(frozen=True)
class Section:
    """A table of the report, and what stands beside it there.

    Attributes:
        draw: draws on a matplotlib figure, which the report shows above the table.
        size: of the figure, in inches.
        wide: the figure takes the whole width of the page.
        terminal: the table is also printed on the terminal.
    """

    table: Table
    draw: Callable[[Any], None] | None = None
    size: tuple[float, float] = (7.6, 2.9)
    wide: bool = False
    terminal: bool = True


@dataclass(frozen=True)
class Excerpts:
    """Generated text to read in the report: each prompt with what the systems wrote after it, by their names."""

    title: str
    texts: list[tuple[str, dict[str, str]]]
    note: str = ""


@dataclass(frozen=True)
class Compared:
    """A figure as ``bench compare`` shows it."""

    system: str
    figure: str
    value: Figure


class Measurement(Generic[Report]):
    """Base class. The docstring of a subclass is the help of its command; its type parameter is its report's type.

    A module of a measurement imports torch only inside :meth:`measure`, so that results can be read, compared and
    reported without it.
    """

    name: ClassVar[str]
    """Name in the recipe and in rows: that of its file; on the command line, with - for _."""
    title: ClassVar[str]
    """Title of its first table."""
    key: ClassVar[str | None] = None
    """Key of its report in ``results.json``; None takes the name."""
    order: ClassVar[int]
    """Measurements run, and are shown, in this order."""
    requires: ClassVar[tuple[type[Measurement[Any]], ...]] = ()
    """Measurements that its command runs first."""
    distributed: ClassVar[bool] = False
    """All processes of a launch measure it together; others are left to the first process."""
    headline: ClassVar[bool] = False
    """A benchmark of all headline measurements writes samples too."""
    reads_corpus: ClassVar[bool] = True
    """Rows say how long the held-out sentences are."""
    random_weights: ClassVar[bool] = False
    """It can measure random weights in a recipe's shapes instead of a trained model."""
    plain_llm: ClassVar[bool] = False
    """It can measure an LLM that nothing was trained for: its command takes one by name, too."""
    one_line: ClassVar[bool] = False
    """Its systems share one line of provenance."""
    on_cards: ClassVar[bool] = False
    """Its first table stands on the cards of the models that it measured."""
    compared: ClassVar[tuple[str, ...]] = ()
    """Figures of its rows that ``bench compare`` shows."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines at the end of its help."""
    options: ClassVar[tuple[str, ...]] = ()
    """Fields of the recipe's ``bench`` section that its command has options for, under the same names."""
    flags: ClassVar[tuple[Flag, ...]] = ()
    """Other options of its command."""
    report_type: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]
        cls.key = cls.key or cls.name
        (cls.report_type,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]

    # ---- its report in the results

    @classmethod
    def of(cls, results: Results) -> Report:
        """Its report; None (or an empty list) where it was not measured."""
        return getattr(results.reports, str(cls.key))

    @classmethod
    def put(cls, results: Results, report: Report) -> None:
        """Store its report."""
        setattr(results.reports, str(cls.key), report)

    @classmethod
    def nothing(cls) -> Any:
        """Its report before it is measured."""
        return [] if get_origin(cls.report_type) is list else None

    # ---- what a subclass says

    def prepare(self, bench: Bench) -> None:
        """Fail now rather than after an hour: called before anything is measured."""

    def measure(self, bench: Bench) -> Report:
        """Measure, add rows with :meth:`Bench.row`, and return the report.

        Raises:
            Missing: what it needs is not there; the results then say so.
        """
        raise NotImplementedError

    def sections(self, results: Results) -> list[Section]:
        """Its tables, with their figures. Only called when it has rows."""
        raise NotImplementedError

    def excerpts(self, results: Results) -> list[Excerpts]:
        """Text to read in the report."""
        return []

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        """Headline figures of the report, each with what it means."""
        return []

    def comparison(self, results: Results) -> list[Compared]:
        """Figures that ``bench compare`` shows."""
        return [
            Compared(row.system, name, row.figures.get(name))
            for row in results.rows_of(self.name)
            for name in self.compared
        ]

    def warnings(self, results: Sequence[Results]) -> list[str]:
        """Why its figures in several results may not be comparable."""
        return []

    def verdict(self, results: Results) -> None:
        """Raise an error that its command ends with, although everything was measured."""

    def command(self, console: Callable[[], Console]) -> Callable[..., None] | None:
        """Its command, where it does something else than measure a folder.

        Args:
            console: makes the console that tables are printed on.
        """
        return None


@cache
def measurements() -> tuple[Measurement[Any], ...]:
    """One of each measurement, in order."""
    found: list[Measurement[Any]] = []
    for name in measurement_names():
        module = import_module(f"sentcompress.benchmark.measurements.{name}")
        found += [
            kind()
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Measurement) and kind.__module__ == module.__name__
        ]
    return tuple(sorted(found, key=lambda measurement: measurement.order))
