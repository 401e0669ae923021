"""What command-line tools share: progress bars, a table, exit codes."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from cpt_mega.errors import CptMegaError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextlib.contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``progress(bytes_done, bytes_in_all)``; drawn on standard error, and only on a terminal."""
    with _progress(title, DownloadColumn(), TransferSpeedColumn()) as progress:
        yield progress


@contextlib.contextmanager
def steps_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``progress(steps_done, steps_in_all)``; drawn on standard error, and only on a terminal."""
    with _progress(title, MofNCompleteColumn()) as progress:
        yield progress


@contextlib.contextmanager
def _progress(title: str, *amounts: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(title: str, rows: Mapping[str, object], next_command: str) -> None:
    """A two-column table, and the next command to type."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
    print(f"next: {next_command}")


def run_tool(main: Callable[[], int | None], interrupted: str = "interrupted: nothing was written") -> int:
    """Runs a tool's body: what it returns (nothing is 0), or an error's own exit code after one line on standard error, or 130
    after Ctrl-C, which ``interrupted`` explains."""
    try:
        return main() or 0
    except CptMegaError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:  # who read the output has seen enough: `... | head`
        # what is still in the buffer would be complained about at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
