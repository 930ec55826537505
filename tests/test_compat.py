"""Every shim does its job, and what it repairs is really broken without it."""

import argparse
import ast
import contextlib
import copy
import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.data import FairseqDataset, TokenBlockDataset, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask
from hydra.core import utils as hydra_utils
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fairseq_fastweights import compat
from fairseq_fastweights.errors import FastWeightError

compat.apply()


@pytest.fixture
def without_shim(monkeypatch):
    """Put back what a shim wrapped, for one test."""

    def put_back(module, name):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)

    return put_back


@pytest.fixture
def without_allow_list():
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


def checkpoint(**entries):
    """The least that fairseq takes for a checkpoint."""
    history = {"num_updates": 3, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    return {
        "args": None,
        "cfg": {"model": argparse.Namespace(arch="a", dropout=0.5), "task": {"_name": "t"}},
        "model": {"w": torch.arange(4.0)},
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 2}},
        **entries,
    }


def save(path, content):
    torch.save(content, path)
    return str(path)


def test_applying_twice_wraps_once():
    wrapped = checkpoint_utils.load_checkpoint_to_cpu
    getter = hydra_utils.JobReturn.return_value.fget
    compat.apply()
    assert checkpoint_utils.load_checkpoint_to_cpu is wrapped
    assert hydra_utils.JobReturn.return_value.fget is getter
    for function in (wrapped, getter):
        assert not hasattr(function.__wrapped__, "is_fast_weight_shim")


# --- what a checkpoint may hold -------------------------------------------------------------------

METERS = {
    "ints": np.arange(6).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
    "big_endian": np.array([1.5, -2.0], dtype=">f8"),
    "flags": np.array([True, False]),
    "scalar": np.float64(0.1),
    "count": np.int64(-7),
}


def test_a_checkpoint_of_plain_data_is_read(tmp_path):
    state = checkpoint(extra_state={"train_iterator": {"epoch": 2}, "metrics": METERS})
    loaded = checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "c.pt", state))
    assert vars(loaded["cfg"].model) == {"arch": "a", "dropout": 0.5}
    for name, value in METERS.items():
        read = loaded["extra_state"]["metrics"][name]
        assert isinstance(read, np.ndarray) == isinstance(value, np.ndarray)
        np.testing.assert_array_equal(read, value)
        assert read.dtype == value.dtype.newbyteorder("=")


@pytest.mark.usefixtures("without_allow_list")
@pytest.mark.parametrize("content", [argparse.Namespace(a=1), *METERS.values()])
def test_without_the_allow_list_it_is_refused(tmp_path, content):
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(save(tmp_path / "c.pt", content))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_array_that_was_read_is_written_as_a_numpy_array(tmp_path, protocol):
    array = torch.load(save(tmp_path / "a.pt", METERS["columns"]))
    for value in (array, array + 1, copy.deepcopy(array)):
        pickled = pickle.dumps(value, protocol)
        assert b"fairseq_fastweights" not in pickled
        assert type(pickle.loads(pickled)) is np.ndarray
        np.testing.assert_array_equal(pickle.loads(pickled), value)


def test_the_allow_list_is_exactly_this():
    named = {entry[1]: entry[0] for entry in compat._checkpoint_globals()[1:]}
    assert compat._checkpoint_globals()[0] is argparse.Namespace
    assert named == {
        "numpy.ndarray": compat.PlainArray,
        "numpy.dtype": compat.PlainDtype,
        "numpy.core.multiarray._reconstruct": compat.plain_array,
        "numpy.core.multiarray.scalar": compat.plain_scalar,
        "numpy._core.multiarray._reconstruct": compat.plain_array,
        "numpy._core.multiarray.scalar": compat.plain_scalar,
    }


# --- a checkpoint never runs code -----------------------------------------------------------------


class Call:
    """Pickles as a call: unpickled the usual way, it runs."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def attacks(victim):
    return {
        "posix.system": Call(os.system, f"touch {victim}"),
        "getattr": Call(Path.touch, victim),  # a method is pickled as getattr(class, name)
        "eval": Call(eval, f"open({str(victim)!r}, 'w')"),
        "io.open": Call(open, str(victim), "w"),
    }


@pytest.fixture(params=sorted(attacks(Path("x"))))
def attack(request, tmp_path):
    """The path of a malicious checkpoint, the global it uses and the file it would create."""
    victim = tmp_path / "victim"
    state = checkpoint(extra_state={"bad": attacks(victim)[request.param]})
    return save(tmp_path / "attack.pt", state), request.param, victim


def test_a_checkpoint_that_would_run_code_is_refused(attack):
    path, name, victim = attack
    with pytest.raises(FastWeightError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert str(caught.value).startswith(f"checkpoint {path} is refused: it holds {name}")
    assert "\n" not in str(caught.value)
    assert not victim.exists()


def test_code_is_refused_even_where_fairseq_allows_it(attack, monkeypatch, without_shim):
    path, _name, victim = attack
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{"weights_only": False, **k}))
    with pytest.raises(FastWeightError, match="is refused"):
        checkpoint_utils.load_checkpoint_to_cpu(path)
    assert not victim.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    without_shim(checkpoint_utils, "load_checkpoint_to_cpu")
    checkpoint_utils.load_checkpoint_to_cpu(path)
    assert victim.exists()


class Rebuilt:
    """Pickles as numpy's reconstruction protocol with a state of our choice."""

    def __init__(self, function, args, state):
        self.parts = function, args, state

    def __reduce__(self):
        return self.parts


RECONSTRUCT = np.zeros(1).__reduce__()[0]
SCALAR = np.float64(1).__reduce__()[0]
POINTER = b"\x41" * 8  # read as an object, it is a wild pointer


@pytest.mark.parametrize(
    "content",
    [
        np.array([{}], dtype=object),
        np.zeros(1, dtype=[("a", "i8"), ("b", "O")]),
        np.dtype("O"),
        np.array(["text"]),
        np.array("2020-01-01", dtype="M8[D]"),
        Rebuilt(np.dtype, ("i8",), (3, "<", None, ("a",), {"a": (np.dtype("i8"), 0)}, 8, 8, 63)),
        Rebuilt(np.dtype, ("i8",), (3, "<", (np.dtype("i8"), (2,)), None, None, 8, 8, 63)),
        Rebuilt(np.dtype, ("i8",), (3, "O", None, None, None, 8, 8, 63)),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), int, False, POINTER)),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("i8"), False, POINTER)),
        Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("i8"), False, [object])),
        Call(SCALAR, np.dtype("i8"), POINTER[:4]),
        Call(np.ndarray, (1,), "O"),
        Call(np.ndarray, (1 << 40,)),
    ],
    ids=lambda content: type(content).__name__,  # the same in every process, as pytest-xdist needs
)
def test_numpy_values_other_than_plain_numbers_are_refused(tmp_path, content):
    path = save(tmp_path / "n.pt", checkpoint(extra_state={"bad": content}))
    with pytest.raises(FastWeightError, match=r"^checkpoint .*n\.pt (cannot be read|is refused)"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_a_hostile_dtype_flag_has_no_effect(tmp_path):
    hostile = Rebuilt(np.dtype, ("i8",), (3, "<", None, None, None, -1, -1, 63))
    state = (1, (1,), hostile, False, POINTER)
    path = save(tmp_path / "f.pt", Rebuilt(RECONSTRUCT, (np.ndarray, (0,), b"b"), state))
    assert torch.load(path).dtype.flags == np.dtype("i8").flags


def test_option_strings_of_a_checkpoint_do_not_run(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    code = f"[open({str(victim)!r}, 'w') and 1]"
    readers = (utils.eval_str_list, utils.eval_str_dict, utils.eval_bool)
    for reader in readers:
        with pytest.raises(FastWeightError, match="is not a literal"):
            reader(code)
    assert not victim.exists()

    monkeypatch.delattr(utils, "eval")
    utils.eval_str_list(code)
    assert victim.exists()


def test_a_model_is_built_without_running_its_options(tmp_path):
    victim = tmp_path / "victim"
    cfg = {"_name": "transformer_lm", "adaptive_softmax_cutoff": f"open({str(victim)!r}, 'w')"}
    task = build_lm_task(tmp_path, ["a b c"] * 8)
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(tmp_path), *TINY_LM])
    vars(args).update(cfg)
    with pytest.raises(FastWeightError, match="is not a literal"):
        task.build_model(args)
    assert not victim.exists()


def test_no_module_of_fairseq_calls_the_real_eval():
    callers = [
        module
        for name, module in sys.modules.items()
        if name.startswith("fairseq.") and calls_eval(source_of(module))
    ]
    assert utils in callers
    assert all(module.eval is compat.read_literal for module in callers)


def calls_eval(source):
    """Not a method of that name, as model.eval()."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "eval" for function in calls)


def source_of(module):
    path = getattr(module, "__file__", None) or ""
    return Path(path).read_text() if path.endswith(".py") else ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        (" (0.9, 1 - 1e-3)", (0.9, 0.999)),
        ("[(512, 10, 5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        ("{'a': [True, -1]}", {"a": [True, -1]}),
        ("10000, 50000", (10000, 50000)),
    ],
)
def test_literals_are_read_as_eval_reads_them(text, value):
    assert compat.read_literal(text) == value


@pytest.mark.parametrize(
    "text", ["x", "(", "", "f()", "a.b", "2 ** 9", "[] - 1", "__import__('os')", "(" * 500]
)
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(FastWeightError, match="is not a literal"):
        compat.read_literal(text)


def test_literals_are_strings_only():
    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_bool("False") is False
    assert utils.eval_bool(3, default="default") == "default"  # fairseq relies on the TypeError


# --- files that are no checkpoints ----------------------------------------------------------------


def good_bytes():
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer)
    return buffer.getvalue()


def saved_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "truncated": good_bytes()[: len(good_bytes()) // 2],
    "one byte short": good_bytes()[:-1],
    "text": b"once upon a time\n" * 50,
    "noise": bytes(range(256)) * 20,
    "zip of something else": b"PK\x05\x06" + bytes(18),
    "plain pickle": pickle.dumps({"model": {}}, 4),
    "tensor": saved_bytes(torch.zeros(3)),
    "list": saved_bytes([1, 2]),
    "bare weights": saved_bytes({"w": torch.zeros(3)}),
    "checkpoint of another program": saved_bytes({"model": {}, "epoch": 3}),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, kind, without_shim):
    path = tmp_path / "bad.pt"
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(FastWeightError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    message = f"checkpoint {path} cannot be read (truncated or not a checkpoint): "
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) > len(message)
    assert "\n" not in str(caught.value)

    without_shim(checkpoint_utils, "load_checkpoint_to_cpu")
    with pytest.raises(Exception) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert not isinstance(caught.value, FastWeightError)


def test_a_file_cut_anywhere_is_named(tmp_path):
    path, content = tmp_path / "cut.pt", saved_bytes(checkpoint(model={"w": torch.zeros(10000)}))
    message = r"cut\.pt cannot be read \(truncated or not a checkpoint\): "
    for length in range(1, len(content), len(content) // 60):
        path.write_bytes(content[:length])
        with pytest.raises(FastWeightError, match=message):
            checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FastWeightError, match=r"cannot be read: Is a directory$"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path))


def test_a_missing_checkpoint_keeps_fairseqs_message(tmp_path, without_shim):
    path = str(tmp_path / "none.pt")
    for error in (FastWeightError, OSError):
        with pytest.raises(error, match=f"^Model file not found: {path}$"):
            checkpoint_utils.load_model_ensemble([path])

    without_shim(checkpoint_utils, "load_model_ensemble_and_task")
    with pytest.raises(OSError, match="Model file not found") as caught:
        checkpoint_utils.load_model_ensemble([path])
    assert not isinstance(caught.value, FastWeightError)


def test_errors_that_are_not_the_files_stay_as_they_are(tmp_path, monkeypatch):
    def fail(state):
        raise KeyError("not the file's fault")

    monkeypatch.setattr(checkpoint_utils, "_upgrade_state_dict", fail)
    with pytest.raises(KeyError, match="not the file's fault"):
        checkpoint_utils.load_checkpoint_to_cpu(save(tmp_path / "c.pt", checkpoint()))
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))


# --- resuming in several processes ----------------------------------------------------------------


@pytest.fixture
def received_state(monkeypatch):
    """What rank 1 makes of a state that rank 0 broadcasts, both played in this process."""

    def receive(state):
        wire = []
        monkeypatch.setattr(distributed_utils, "broadcast", lambda t, src, group: wire.append(t))
        monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 0)
        distributed_utils._broadcast_object_slow(state, 0, None, "cpu")
        take = iter(wire)
        monkeypatch.setattr(distributed_utils, "broadcast", lambda t, src, group: t.copy_(next(take)))
        monkeypatch.setattr(distributed_utils, "get_rank", lambda group: 1)
        return distributed_utils._broadcast_object_slow(None, 0, None, "cpu")

    return receive


@pytest.fixture
def state_of_rank_0(tmp_path):
    cfg = {"model": argparse.Namespace(arch="a"), "task": {"n": 1, "x": 1.5, "b": None, "l": [1]}}
    path = save(tmp_path / "c.pt", checkpoint(cfg=cfg, extra_state={"metrics": METERS}))
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    assert OmegaConf.is_config(state["cfg"])
    str(state["cfg"].task.x)  # reading it fills the caches that are then pickled
    return distributed_utils._split_tensors_from_obj(state, [])


def test_the_config_reaches_every_process(received_state, state_of_rank_0):
    received = received_state(state_of_rank_0)
    assert received["cfg"] == state_of_rank_0["cfg"]
    assert received["cfg"].task.l == [1]
    assert received["model"] == state_of_rank_0["model"]


def test_without_the_shim_the_config_is_refused(received_state, state_of_rank_0, without_shim):
    without_shim(distributed_utils, "_broadcast_object_slow")
    with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
        received_state(state_of_rank_0)


def test_config_objects_are_allowed_in_a_broadcast_only(tmp_path, received_state, state_of_rank_0):
    before = set(torch.serialization.get_safe_globals())
    received_state(state_of_rank_0)
    assert set(torch.serialization.get_safe_globals()) == before
    path = save(tmp_path / "o.pt", checkpoint(cfg=OmegaConf.create({"a": 1})))
    with pytest.raises(FastWeightError, match="is refused: it holds omegaconf"):
        checkpoint_utils.load_checkpoint_to_cpu(path)


# --- the last partial batch -----------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), max_size=70),
    multiple=st.integers(1, 9),
    max_tokens=st.one_of(st.none(), st.integers(9, 60)),
    max_sentences=st.one_of(st.none(), st.integers(1, 20)),
)
def test_every_sentence_is_in_one_batch(sizes, multiple, max_tokens, max_sentences):
    indices = np.arange(len(sizes))[::-1].copy()
    batches = data_utils.batch_by_size(indices, lambda i: sizes[i], None, max_tokens, max_sentences, multiple)
    assert [i for batch in batches for i in batch] == list(indices)
    for batch in batches:
        assert 0 < len(batch) <= (max_sentences or len(sizes))
        assert max_tokens is None or len(batch) * max(sizes[i] for i in batch) <= max_tokens


def test_fixed_shapes_and_iterators_are_as_before():
    batches = data_utils.batch_by_size(range(10), lambda i: 3, fixed_shapes=[(4, 8), (2, 16)])
    assert sum(map(len, batches)) == 10
    batches = data_utils.batch_by_size(iter(range(10)), lambda i: 3, max_sentences=4)
    assert sum(map(len, batches)) == 10


class Sentences(FairseqDataset):
    def __init__(self, count):
        self.sizes = np.full(count, 3)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return index

    def collater(self, samples):
        return samples

    def num_tokens(self, index):
        return 3

    def size(self, index):
        return 3

    def ordered_indices(self):
        return np.arange(len(self))


def sentences_of_a_pass(count):
    task = FairseqTask(argparse.Namespace())
    batches = task.get_batch_iterator(Sentences(count), max_tokens=90, required_batch_size_multiple=8)
    return sorted(i for batch in batches.next_epoch_itr(shuffle=False) for i in batch)


@pytest.mark.parametrize("count", [3, 60])
def test_a_task_iterates_over_every_sentence(count, without_shim):
    assert sentences_of_a_pass(count) == list(range(count))
    without_shim(data_utils, "batch_by_size")
    assert len(sentences_of_a_pass(count)) == count // 8 * 8


# --- search ---------------------------------------------------------------------------------------


def test_repeated_pairs_are_blocked_without_the_extension(without_shim):
    from fairseq.ngram_repeat_block import NGramRepeatBlock

    tokens = torch.tensor([[2, 5, 6, 5, 1, 1, 1]])  # 5 6 5, then padding: 6 must not come next

    def blocked():
        return (
            NGramRepeatBlock(2, use_extension=False)(tokens, torch.zeros(1, 8), 1, 1, 3)
            .isinf()
            .nonzero()
            .tolist()
        )

    assert blocked() == [[0, 6]]
    without_shim(NGramRepeatBlock, "forward")
    assert blocked() == []


@pytest.mark.parametrize("words", [0, 5])
def test_a_validation_without_a_word_has_bleu_0(words, without_shim):
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion
    from fairseq.logging import metrics
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    task = TranslationTask(TranslationConfig(eval_bleu=True), None, None)
    log = {"loss": 1.0, "ntokens": 5, "nsentences": 1, "sample_size": 5}
    log |= {"_bleu_sys_len": words, "_bleu_ref_len": 5}
    for n in range(4):
        log |= {f"_bleu_counts_{n}": words // (n + 2), f"_bleu_totals_{n}": max(0, words - n)}

    def bleu():
        with metrics.aggregate(new_root=True) as found:
            task.reduce_metrics([log], CrossEntropyCriterion(task, False))
        return found.get_smoothed_values().get("bleu")

    assert bleu() > 0 if words else bleu() == 0
    without_shim(TranslationTask, "reduce_metrics")
    assert (bleu() is None) == (words == 0)


# --- fp16 and bf16 ---------------------------------------------------------------------------------------

TINY_LM = [
    "--task",
    "language_modeling",
    "--arch",
    "transformer_lm",
    "--decoder-layers",
    "1",
    "--decoder-embed-dim",
    "8",
    "--decoder-ffn-embed-dim",
    "8",
    "--decoder-attention-heads",
    "2",
    "--tokens-per-sample",
    "8",
    "--max-tokens",
    "64",
    "--sample-break-mode",
    "eos",
    "--optimizer",
    "adam",
    "--lr",
    "0.001",
    "--max-update",
    "1",
    "--no-progress-bar",
    "--cpu",
    "--no-save",
    "--disable-validation",
]


def build_lm_task(folder, lines):
    """Binarise a training text and return its task, without a subprocess."""
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary()
    encoded = [dictionary.encode_line(line, add_if_not_exist=True) for line in lines]
    dictionary.save(str(folder / "dict.txt"))
    prefix = str(folder / "train")
    builder = indexed_dataset.make_builder(prefix + ".bin", "mmap", vocab_size=len(dictionary))
    for line in encoded:
        builder.add_item(line)
    builder.finalize(prefix + ".idx")
    args = options.parse_args_and_arch(options.get_training_parser(), [str(folder), *TINY_LM])
    return tasks.setup_task(args)


@contextlib.contextmanager
def logging_kept():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def train(folder, *flags):
    from fairseq_cli import train as command

    with logging_kept(), pytest.MonkeyPatch.context() as patch:
        save_dir = ["--save-dir", str(folder / "checkpoints")]
        patch.setattr(sys, "argv", ["fairseq-train", str(folder), *TINY_LM, *save_dir, *flags])
        command.cli_main()


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16"])
def test_bf16_trains_without_a_tpu(tmp_path, flag, without_shim):
    build_lm_task(tmp_path, ["a b c d", "b c", "d a"] * 4)
    train(tmp_path, flag)
    without_shim(distributed_utils, "call_main")
    with pytest.raises(AttributeError, match="xla_device"):
        train(tmp_path, flag)


def test_fp16_trains_on_the_cpu(tmp_path, without_shim):
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    build_lm_task(tmp_path, ["a b c d", "b c", "d a"] * 4)
    train(tmp_path, "--fp16")
    without_shim(FP16Optimizer, "build_optimizer")
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            train(tmp_path, "--fp16")


def tpu_flags(*flags):
    """The groups with the flag on, in the configuration that a command gets."""
    args = ["data", *TINY_LM, "--distributed-world-size", "1", *flags]
    args = options.parse_args_and_arch(options.get_training_parser(), args)
    cfg = convert_namespace_to_omegaconf(args)
    seen = []
    distributed_utils.call_main(cfg, seen.append)
    groups = [name for name in cfg if "tpu" in (cfg[name] or {})]
    assert {"common", "distributed_training"} <= set(groups)
    return {name for name in groups if seen[0][name].tpu}


def test_only_bf16_leaves_the_tpu(without_shim):
    assert tpu_flags("--tpu") >= {"common", "distributed_training", "optimizer", "model"}
    assert tpu_flags("--bf16") == tpu_flags("--memory-efficient-bf16") == set()
    without_shim(distributed_utils, "call_main")
    assert tpu_flags("--bf16") >= {"common", "distributed_training", "optimizer", "model"}


def test_a_model_configured_through_argparse_leaves_the_tpu():
    groups = {"model": argparse.Namespace(tpu=True), "common": {"tpu": True}, "task": None}
    cfg = OmegaConf.create(groups, flags={"allow_objects": True})
    compat._clear_tpu(cfg)
    assert cfg.model.tpu is cfg.common.tpu is False


# --- numpy 2 --------------------------------------------------------------------------------------


def test_sentences_are_blocks_again(monkeypatch):
    def blocks():
        tokens = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
        return TokenBlockDataset(tokens, [3, 2], 8, pad=1, eos=2, break_mode="eos")

    monkeypatch.delattr(np, "compat", raising=False)
    with pytest.raises(AttributeError, match="compat"):
        blocks()
    monkeypatch.setattr(np, "compat", None, raising=False)  # so that it is put back afterwards
    del np.compat
    compat.apply()
    assert [block.tolist() for block in blocks()] == [[4, 5, 2], [6, 2]]


# --- one line at the command line -----------------------------------------------------------------


def failed_job(error):
    job = hydra_utils.JobReturn(status=hydra_utils.JobStatus.FAILED)
    job.return_value = error
    return job


def test_a_mistake_under_hydra_ends_in_one_line(monkeypatch):
    job = failed_job(FastWeightError("nu is 9"))
    with pytest.raises(SystemExit) as caught:
        job.return_value  # noqa: B018 - reading it is the test
    assert caught.value.code == "fairseq_fastweights: error: nu is 9"
    with pytest.raises(KeyError):
        failed_job(KeyError("k")).return_value  # noqa: B018

    original = property(hydra_utils.JobReturn.return_value.fget.__wrapped__)
    monkeypatch.setattr(hydra_utils.JobReturn, "return_value", original)
    with pytest.raises(FastWeightError):
        job.return_value  # noqa: B018


def test_a_successful_job_returns_its_value():
    job = hydra_utils.JobReturn(status=hydra_utils.JobStatus.COMPLETED)
    job.return_value = 1.5
    assert job.return_value == 1.5


USER_DIR = """
import fairseq_fastweights.compat as compat
compat.apply()
"""


@pytest.mark.parametrize("command", ["train", "hydra_train"])
def test_a_half_written_checkpoint_is_one_line_from_the_command(tmp_path, command):
    data, user_dir = tmp_path / "data", tmp_path / "shims"
    for folder in (data, user_dir, tmp_path / "checkpoints"):
        folder.mkdir()
    (user_dir / "__init__.py").write_text(USER_DIR)
    build_lm_task(data, ["a b c d", "b c", "d a"] * 4)
    (tmp_path / "checkpoints/checkpoint_last.pt").write_bytes(BAD_FILES["truncated"])

    result = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{command}", *arguments(command, data, user_dir)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(compat.__file__).parents[1])},
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "Error executing job" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fairseq_fastweights: error: checkpoint ")
    assert "checkpoint_last.pt cannot be read (truncated or not a checkpoint): " in last


def arguments(command, data, user_dir):
    if command == "train":
        flags = [flag for flag in TINY_LM if flag != "--no-save"]
        return [str(data), "--user-dir", str(user_dir), *flags]
    return [
        f"common.user_dir={user_dir}",
        "common.cpu=true",
        "task=language_modeling",
        f"task.data={data}",
        "task.sample_break_mode=eos",
        "task.tokens_per_sample=8",
        "+model._name=transformer_lm",
        "+model.decoder_layers=1",
        "+model.decoder_embed_dim=8",
        "+model.decoder_ffn_embed_dim=8",
        "+model.decoder_attention_heads=2",
        "criterion=cross_entropy",
        "optimizer=adam",
        "lr_scheduler=fixed",
        "optimization.max_update=1",
        "optimization.lr=[0.001]",
        "dataset.max_tokens=64",
        "dataset.disable_validation=true",
        f"checkpoint.save_dir={user_dir.parent}/checkpoints",
    ]
