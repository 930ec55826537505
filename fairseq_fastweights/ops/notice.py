"""A line for whoever waits for a compiler."""

import contextlib
import logging
import threading
from typing import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Log once that ``what`` is being compiled, if it takes more than a second (from a cache it does not)."""
    notice = threading.Timer(1.0, logger.info, ["compiling %s (once: the code is kept)", what])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
