"""python measured.py RECORD LOCK COMMAND...: runs a command and adds a line to RECORD of what it took.

A process of its own, of the standard library alone and started as a script: the peak that the kernel reports for a
process is never below that of the process that started it, and whoever has imported torch is large.

The line is JSON: status, seconds, peak_resident_bytes (of the largest process below this one). LOCK is held as long as
the command or anything it started lives, so that no two train into one folder: exit status 75 if it is taken.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

TAKEN = 75
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main(record, lock, *command):
    # the whole process group is told to stop; this process writes its line first
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("another process is still running in this folder", file=sys.stderr)
        return TAKEN
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[held])
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    line = {
        "status": code,
        "seconds": round(time.monotonic() - started, 3),
        "peak_resident_bytes": usage.ru_maxrss * MAXRSS_UNIT,
    }
    with open(record, "a") as lines:
        lines.write(json.dumps(line) + "\n")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
