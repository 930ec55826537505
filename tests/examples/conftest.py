"""A made-up language pair for the translation recipes, prepared once."""

import os
import sys
from pathlib import Path

import pytest
from language_pair import TRANSLATION, bash, sentences, write_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """train, valid and test in .en and .de."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, train=sentences(120, 1), valid=sentences(12, 2), test=sentences(12, 3))
    return folder


@pytest.fixture(scope="session")
def prepared(pairs, tmp_path_factory) -> Path:
    """WORK of a translation recipe: its folder data has the pairs in 60 pieces."""
    work = tmp_path_factory.mktemp("work")
    splits = [pairs / split for split in ("train", "valid", "test")]
    bash(TRANSLATION / "prepare_pairs.sh", "en", "de", *splits, work / "data", VOCAB="60")
    return work


@pytest.fixture
def without_binarising(tmp_path) -> dict[str, str]:
    """An environment in which fairseq-preprocess makes an empty folder: what comes before it is tested."""
    stand_in = tmp_path / "bin/fairseq-preprocess"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nmkdir -p "${@: -1}"\n')
    stand_in.chmod(0o755)
    return {"PATH": f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
