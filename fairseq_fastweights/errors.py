"""A user's mistake, told in one line. Standard library only."""

import os
import re
import sys
from types import TracebackType

TRACEBACK_VARIABLE = "FASTWEIGHTS_TRACEBACK"


class FastWeightError(ValueError):
    """A mistake the user can correct: its message is one line and names what was wrong."""


def user_mistake(error: BaseException | None) -> str | None:
    """The line to print if a FastWeightError is behind ``error``, else None.

    The chain is followed as Python prints it (``__cause__``, else ``__context__`` unless it was
    suppressed), because fairseq wraps errors in its own: a checkpoint that does not fit becomes
    "Cannot load model parameters". With FASTWEIGHTS_TRACEBACK=1 the answer is always None.
    """
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        return None
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        message = _own_message(error)
        if message is not None:
            return "fairseq_fastweights: error: " + " ".join(message.split())
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def install_excepthook() -> None:
    """Print an uncaught FastWeightError as one line; leave everything else to the previous hook.

    The exit status stays 1. Calling it again changes nothing.
    """
    previous = sys.excepthook
    if getattr(previous, "prints_fast_weight_errors", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = user_mistake(error)
        if line is None:
            previous(kind, error, trace)
        else:
            print(line, file=sys.stderr)

    excepthook.prints_fast_weight_errors = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook


def _own_message(error: BaseException) -> str | None:
    if isinstance(error, FastWeightError):
        return str(error)
    if type(error).__name__ == "ProcessRaisedException":
        return _message_of_child(str(error))
    return None


def _message_of_child(traceback_text: str) -> str | None:
    # torch.multiprocessing.spawn hands a child's exception over as the text of its traceback
    package = re.escape(__name__.partition(".")[0])
    found = re.search(rf"^{package}\.[\w.]+Error: (.*)$", traceback_text, re.MULTILINE)
    return found[1] if found else None
