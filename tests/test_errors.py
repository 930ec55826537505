"""A FastWeightError is one line and exit status 1, however deep it is wrapped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_fastweights import errors

# errors.py runs alone: nothing but the standard library behind it
START = f"""
import sys
sys.path.insert(0, {str(Path(errors.__file__).parent)!r})
import errors
"""
WRAPPED = """
def build():
    raise errors.FastWeightError("nu is 9,\\n  allowed are 1 to 8")

def load():
    try:
        build()
    except Exception:
        raise Exception("Cannot load model parameters")

load()
"""
LINE = "fairseq_fastweights: error: nu is 9, allowed are 1 to 8\n"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def test_uncaught_error_is_one_line():
    result = run("errors.install_excepthook()" + WRAPPED)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", LINE)


def test_without_the_hook_it_is_a_traceback():
    result = run(WRAPPED)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 2


def test_environment_variable_brings_the_traceback_back():
    result = run("errors.install_excepthook()" + WRAPPED, FASTWEIGHTS_TRACEBACK="1")
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 2
    assert LINE not in result.stderr


def test_other_errors_go_to_the_previous_hook():
    previous = "sys.excepthook = lambda kind, error, trace: print(kind.__name__, error)\n"
    result = run(previous + "errors.install_excepthook()\nraise KeyError(5)")
    assert (result.returncode, result.stdout, result.stderr) == (1, "KeyError 5\n", "")


def test_installing_twice_changes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    errors.install_excepthook()
    hook = sys.excepthook
    errors.install_excepthook()
    assert hook is not sys.__excepthook__
    assert sys.excepthook is hook


def raised(*links):
    """The exception that comes out of raising each link while handling the one before."""
    try:
        try:
            if len(links) > 1:
                raise raised(*links[:-1])
        finally:
            raise links[-1]
    except BaseException as error:  # noqa: BLE001 - any exception may be asked for
        return error


def test_a_plain_error_is_no_user_mistake():
    assert errors.user_mistake(None) is None
    assert errors.user_mistake(raised(ValueError("x"))) is None
    assert errors.user_mistake(raised(ValueError("x"), KeyError("y"))) is None


def test_the_outermost_mistake_of_a_chain_is_told():
    inner, outer = errors.FastWeightError("inner"), errors.FastWeightError("outer")
    line = errors.user_mistake(raised(inner, outer, KeyError("k")))
    assert line == "fairseq_fastweights: error: outer"


def test_a_suppressed_context_is_not_told():
    error = raised(errors.FastWeightError("handled"), KeyError("bug"))
    error.__suppress_context__ = True
    assert errors.user_mistake(error) is None


def test_a_circular_chain_ends():
    first, second = KeyError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert errors.user_mistake(first) is None


def fail_in_child(_rank, message):
    try:
        raise errors.FastWeightError(message)
    except errors.FastWeightError:
        raise RuntimeError("wrapped")


def test_the_mistake_of_a_spawned_process_is_told():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as caught:
        torch.multiprocessing.spawn(fail_in_child, args=("no such rule: gama",), nprocs=1)
    assert errors.user_mistake(caught.value) == "fairseq_fastweights: error: no such rule: gama"
