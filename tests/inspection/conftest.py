"""The attentions of tests/modules, the models of tests/models and the commands of tests/cli are used here too."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / folder) for folder in ("modules", "models", "cli")]
