"""Results as tables: base class of all results, and their text."""

from abc import ABC, abstractmethod

from lightning_stn.schedule.tables import Cell, markdown


class Report(ABC):
    """Base class of the results of an analysis.

    `pandas.DataFrame(result.table())` is the table as a data frame; `print(result)` shows a summary, which notebooks
    render.
    """

    @abstractmethod
    def table(self) -> list[dict[str, Cell]]:
        """The result as rows, each a dictionary with the same keys."""

    def summary(self) -> list[dict[str, Cell]]:
        """The rows that `print` shows, by default the whole table."""
        return self.table()

    def __str__(self) -> str:
        """The summary as a table in Markdown."""
        return markdown(self.summary())

    def _repr_markdown_(self) -> str:
        """The summary, for notebooks."""
        return str(self)
