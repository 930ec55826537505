"""Compares fairseq runs, and runs grids of them: ``fastweights-compare``, ``python -m fairseq_fastweights.compare``.

    fastweights-compare PATH [PATH ...] [--out FOLDER] [--json FILE]
    fastweights-compare run grid.yaml [--jobs N]

``logs`` and ``configuration`` read what fairseq-train prints, ``runs`` finds runs in folders, ``tables`` and ``plots``
show them, ``grid`` starts them. Needs the extra ``compare`` (rich, matplotlib, PyYAML).
"""

from importlib import import_module
from types import ModuleType

from ..errors import FastWeightError

PROGRAM = "fastweights-compare"


def needed(module: str, package: str) -> ModuleType:
    """The imported module; FastWeightError that says what to install if there is none."""
    try:
        return import_module(module)
    except ImportError as error:
        raise FastWeightError(
            f"{PROGRAM} needs {package}: pip install 'fairseq_fastweights[compare]' ({error})"
        ) from None
