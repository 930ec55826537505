"""Writes what convert_multi30k.sh has run into README.md: a table of BLEU after conversion, and the commands.

python conversion_results.py WORK [--into FOLDER]     # WORK as for convert_multi30k.sh; FOLDER holds the README.md
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "compare"), str(HERE)]

from evaluate import read_data, read_lines  # noqa: E402
from results import SAMPLES, USUAL, p_value, scores_in  # noqa: E402
from results_in_readme import arguments, machine, write_between_marks  # noqa: E402

from fairseq_fastweights.compare.tables import markdown  # noqa: E402

TITLES = ("model", "updates", "BLEU val", "BLEU test2016", "of softmax", "p", "minutes")
NEW_LINES = (
    "task|encoder-embed|encoder-norm|decoder-embed|decoder-norm|max-target|share-all|max-tokens|optimizer"
)
NEW_LINES += "|criterion|train-only"
ROWS = {  # name: (what it is, tenths of updates in distillation and in training)
    "as-converted": ("as converted", ""),
    "distilled": ("distilled", "distilled"),
    "distilled,trained": ("distilled, then trained", "distilled distilled,trained"),
    "trained": ("trained without distillation", "trained"),
}


def updates_in(log: str) -> int:
    """How many updates a log of fairseq-train says were made."""
    return int(re.findall(r"num_updates:? (\d+) >= max_update", log)[-1])


def cells(work: Path, name: str, references: list[str]) -> list[str]:
    """A row of a converted model."""
    out, softmax = work / "converted", work / "runs/softmax,seed=1/evaluation"
    title, steps = ROWS[name]
    logs = [(out / f"{step}.log").read_text() for step in steps.split()]
    seconds = sum(int((out / f"{step}.finished").read_text()) for step in steps.split())
    valid, test = (scores_in(out / name, split) for split in ("valid", "test"))
    baseline = scores_in(softmax, "test")
    hypotheses = (read_lines(out / name / test["hypotheses"]), read_lines(softmax / baseline["hypotheses"]))
    return [
        title,
        str(sum(map(updates_in, logs))),
        f"{valid['bleu']:.2f}",
        f"{test['bleu']:.2f}",
        f"{test['bleu'] / baseline['bleu']:.1%}" if baseline["bleu"] else "",
        f"{p_value(*hypotheses, references):.3f}",
        f"{seconds / 60:.1f}",
    ]


def results(work: Path) -> str:
    """What stands between the marks of README.md."""
    softmax = work / "runs/softmax,seed=1"
    valid, test = (scores_in(softmax / "evaluation", split) for split in ("valid", "test"))
    made = str(updates_in((softmax / "train.log").read_text()))
    rows = [
        [
            "softmax, the model that is converted",
            made,
            f"{valid['bleu']:.2f}",
            f"{test['bleu']:.2f}",
            "",
            "",
            "",
        ]
    ]
    references = read_data(work / "data").raw("test", "de")
    rows += [cells(work, name, references) for name in ROWS]
    log = (work / "converted/as-converted.log").read_text().replace(str(work), USUAL)
    commands = [line for line in log.splitlines() if line.startswith("fairseq-train ")]
    commands = [re.sub(rf" (--({NEW_LINES}))", r" \\\n    \1", line) for line in commands]
    commands = [
        line.replace(str(HERE.parents[1] / "fairseq_fastweights"), "fairseq_fastweights") for line in commands
    ]
    return "\n".join(
        [
            markdown(TITLES, rows),
            f"On: {machine()}. *p*: of sacreBLEU's paired bootstrap of test BLEU against softmax, {SAMPLES} samples.\n",
            "The commands, as `fastweights-convert` prints them:\n",
            "```bash\n" + "\n".join(commands) + "\n```\n",
        ]
    )


def main() -> None:
    args = arguments(__doc__, HERE)
    write_between_marks(args.into / "README.md", results(args.work), "conversion")
    print(f"{len(ROWS)} rows written into {args.into / 'README.md'}")


if __name__ == "__main__":
    main()
