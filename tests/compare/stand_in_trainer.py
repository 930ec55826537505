"""Stands in for fairseq-train: counts to --max-update, saves after each, logs as fairseq does, and starts at once."""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--save-dir", type=Path)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--max-update", type=int, default=3)
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--seconds", type=float, default=0.0, help="an update takes")
parser.add_argument("--child", action="store_true", help="have a child process that does not want to end")
parser.add_argument("--deaf", action="store_true", help="do not want to end")
parser.add_argument("--no-save", action="store_true")
parser.add_argument("--megabytes", type=int, default=0)
args = parser.parse_args()

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
PREFIX = "2026-01-01 00:00:00 | INFO | "
if args.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
saved = args.save_dir / "saved"
done = int(saved.read_text()) if saved.exists() else 0
configuration = {"_name": None, "common": {"seed": args.seed}, "optimizer": {"lr": [args.lr]}}
print(f"{PREFIX}fairseq_cli.train | {configuration}")
if done:
    print(f"{PREFIX}fairseq.trainer | Loaded checkpoint checkpoint_last.pt (epoch 1 @ {done} updates)")
if args.child:
    child = subprocess.Popen([sys.executable, "-c", DEAF])
    (args.save_dir / "child").write_text(str(child.pid))
held = b"x" * (args.megabytes << 20)
for update in range(done + 1, args.max_update + 1):
    time.sleep(args.seconds)
    if args.lr < 0:
        raise SystemExit("a negative rate")
    loss = args.lr * 10 / update + args.seed
    print(
        f"{PREFIX}train_inner | epoch 001:  1 / 9 loss={loss}, wps=100, num_updates={update}, wall={update}"
    )
    print(
        f"{PREFIX}valid | epoch 001 | valid on 'valid' subset | loss {loss} | num_updates {update}",
        flush=True,
    )
    if not args.no_save:
        saved.write_text(str(update))
