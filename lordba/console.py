"""What commands show: progress and errors on stderr, tables on stdout, and the exit codes."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lordba.errors import LordbaError

PIPE_WIDTH = 120
Item = TypeVar("Item")


def console(*, stderr: bool = False) -> Console:
    """A console on stdout (results) or stderr (all else); a pipe gets a width that tables fit in."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def progress_bar() -> Progress:
    """A progress bar on stderr; use it as a context manager, then `add_task(description, total=...)`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=console(stderr=True))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[str] = ()) -> Table:
    """Text in the first column, numbers (right-aligned) in all others; `totals` closes the table, set off by a line."""
    result = Table(title=title, title_justify="left", show_footer=bool(totals))
    for i, header in enumerate(columns):
        footer = totals[i] if totals else ""
        result.add_column(header, footer=footer, justify="right" if i else "left", overflow="fold" if i else "ellipsis")
    for row in rows:
        result.add_row(*row)
    return result


def group_by_type(items: Iterable[Item], path: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by the last component of their module path (q_proj, ...), in order of appearance: rows of a short table."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(path(item).rsplit(".", 1)[-1], []).append(item)
    return groups


def quiet_libraries() -> None:
    """Keep other libraries' notices off the screen, before they are imported; errors still show."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree", "torch.onnx", "executorch", "transformers", "coremltools"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0, or 2 with one line on stderr for a mistake of the user, or 130 if interrupted."""
    try:
        main()
    except LordbaError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
