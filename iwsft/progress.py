"""Progress of long work on stderr: bars on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.text import Text

INTERVAL = 10.0
Item = TypeVar("Item")


class _Amount(progress.ProgressColumn):
    """How much is done, at which rate, what is left, and the task's note."""

    def render(self, task: progress.Task) -> Text:
        return Text(describe(task))


class Progress(progress.Progress):
    """Progress of named tasks; those that have ended are no longer shown.

    A task's field ``note`` is text that follows its numbers, such as a loss.

    Args:
        shown: Whether to show anything.

    Example:
        >>> with Progress() as shown:
        ...     task = shown.add_task("training", total=100)
        ...     for step in range(100):
        ...         shown.update(task, advance=1, note=f"loss {0.5:.3f}")
    """

    def __init__(self, *, shown: bool = True) -> None:
        console = Console(stderr=True, quiet=not shown)
        title = progress.TextColumn("{task.description}", markup=False)
        columns = (title, progress.BarColumn(20), _Amount())
        hidden = not (shown and console.is_terminal)
        super().__init__(*columns, console=console, transient=True, disable=hidden)
        self._stopped = threading.Event()

    def add_task(
        self, description: str, *args: Any, note: str = "", **fields: Any
    ) -> progress.TaskID:
        return super().add_task(description, *args, note=note, **fields)

    def track(self, items: Sequence[Item], description: str) -> Iterator[Item]:  # type: ignore[override]
        """Yield the items, and count those that are done in a task of this name."""
        # Rich's own counts nothing where it shows no bars.
        task = self.add_task(description, total=len(items))
        for item in items:
            yield item
            self.advance(task)

    def start(self) -> None:
        super().start()
        if self.disable and not self.console.quiet:
            threading.Thread(target=self._print_lines, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        super().stop()

    def _print_lines(self) -> None:
        while not self._stopped.wait(INTERVAL):
            for task in self.tasks:
                if not task.finished:
                    line = ": ".join(filter(None, (task.description, describe(task))))
                    self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(task: progress.Task) -> str:
    """Describe how far a task is: amount, rate per second, time left, note."""
    parts = []
    if task.total is not None:
        parts.append(f"{task.completed:.0f}/{task.total:.0f}")
        if task.speed:
            parts.append(f"{task.speed:.3g}/s")
        if task.time_remaining is not None:
            minutes, seconds = divmod(int(task.time_remaining), 60)
            parts.append(f"{minutes}:{seconds:02} left")
    return "  ".join([*parts, *filter(None, [task.fields["note"]])])
