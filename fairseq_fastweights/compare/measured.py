"""python measured.py RECORD HELD COMMAND...: runs a command and adds a line to RECORD of what it took.

A process of its own, of the standard library alone and started as a script: the peak that the kernel reports for a
process is never below that of the process that started it, and whoever has imported torch is large.

The line is JSON: status, seconds, peak_resident_bytes (of the largest process below this one). HELD is the number of an
open file that the command inherits: a lock on it is held as long as the command or anything it started lives.
"""

import json
import os
import signal
import subprocess
import sys
import time

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main(record, held, *command):
    # the whole process group is told to stop; this process writes its line first
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[int(held)])
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
