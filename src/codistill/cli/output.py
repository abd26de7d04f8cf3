"""Output that never ends a command: whatever stdout and stderr can or cannot take."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class SafeStream:
    """A text stream that replaces characters its encoding lacks, and drops the text when it can no longer be written.

    Args:
        stream: What is written to; None where the process was started without it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | ValueError | None = None
        """Why text was dropped; a reader that went away (`| head`) is no failure."""
        self._gone = stream is None

    def write(self, text: str) -> int:
        """Write text."""
        if not self._gone:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def isatty(self) -> bool:
        """Return whether a terminal shows the text."""
        with suppress(OSError, ValueError):
            return not self._gone and bool(self._stream.isatty())
        return False

    def _give_up(self, error: OSError | ValueError) -> None:
        """Drop this text and all that follows, which Python would try again when it exits."""
        self._gone = True
        if not isinstance(error, BrokenPipeError) and getattr(error, "errno", None) != errno.EPIPE:
            self.failure = error
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_output() -> Iterator[SafeStream]:
    """Replace stdout and stderr by safe streams within the context; yield that of stdout."""
    before = sys.stdout, sys.stderr
    out = SafeStream(sys.stdout)
    sys.stdout, sys.stderr = out, SafeStream(sys.stderr)
    try:
        yield out
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
