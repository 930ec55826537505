"""A made-up language pair, and the recipes of examples/translation run on it."""

import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRANSLATION = ROOT / "examples/translation"
sys.path.insert(0, str(ROOT / "tests/cli"))

NOUNS = {"dog": "Hund", "cat": "Katze", "house": "Haus", "tree": "Baum", "child": "Kind", "bird": "Vogel"}
VERBS = {"sees": "sieht", "finds": "findet", "likes": "mag", "paints": "malt"}


def bash(script, *arguments, ok=True, **environment) -> str:
    """What a recipe prints, on the CPU, with the commands of this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        env={**os.environ, "PATH": path, "GPUS": "0", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """English and German; one to three clauses."""
    chosen, found = random.Random(seed), []
    for _ in range(count):
        clauses = []
        for _ in range(chosen.randint(1, 3)):
            one, other = chosen.choices(list(NOUNS), k=2)
            verb = chosen.choice(list(VERBS))
            clauses.append((f"the {one} {verb} a {other}", f"{NOUNS[one]} {VERBS[verb]} {NOUNS[other]}"))
        english, german = (", and ".join(side) for side in zip(*clauses, strict=True))
        found.append((f"{english.capitalize()}.", f"{german.replace('and', 'und')}."))
    return found


def write_pairs(folder: Path, **splits) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        for side, language in enumerate(("en", "de")):
            (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
