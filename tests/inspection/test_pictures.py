"""What the pictures show: which numbers, at which tokens, under which names."""

import pytest

pytest.importorskip("matplotlib")

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from attention_cases import (  # noqa: E402
    HEADS,
    SOURCE_DIM,
    Case,
    attend,
    build_attention,
    sentences,
)

from fairseq_fastweights.inspection import pictures, recording  # noqa: E402

HEAD_NUMBERS = list(range(HEADS))


def record(site="causal", rule="gated-delta", tokens=5, source=7):
    attention = build_attention(Case(rule, "elu", rule == "sum"), site)
    tensors = [sentences(tokens, 1)] + ([sentences(source, 1, SOURCE_DIM)] if site == "cross" else [])
    with recording(attention) as recordings:
        attend(attention, *tensors)
    return recordings[0]


def words(n, letter="w"):
    return [f"{letter}{i}" for i in range(n)]


def maps(figure):
    """The panels that hold an image, not colour bars."""
    return [ax for ax in figure.axes if ax.get_images()]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("site", ["causal", "bidirectional", "cross"])
def test_weights_are_shown_at_their_tokens(site):
    found = record(site)
    columns = 7 if site == "cross" else 5
    figure = pictures.weights_figure(found, HEAD_NUMBERS, words(5, "r"), words(columns))
    assert len(maps(figure)) == HEADS
    for head, ax in enumerate(maps(figure)):
        (image,) = ax.get_images()
        shown = image.get_array()
        assert np.array_equal(shown.filled(0), found.weights[0, head].numpy())
        assert shown.mask.sum() == (10 if site == "causal" else 0)  # the future is no weight
        assert image.norm.vmin == -image.norm.vmax < 0  # 0 in the middle
        assert ax.get_title().startswith(f"head {head}")
        assert ("right to left" in ax.get_title()) == (site != "causal" and head == 1)
    assert labels(maps(figure)[0].yaxis) == words(5, "r")
    assert labels(maps(figure)[2].xaxis) == words(columns)
    assert "gated-delta" in figure.get_suptitle() and "layer 0" in figure.get_suptitle()


def test_zero_is_white_above_orange_below_purple():
    red, green, blue = (np.array(pictures.signed_colours()([0.0, 0.5, 1.0]))[:, :3]).T
    assert blue[0] > green[0] and red[2] > blue[2]
    assert min(red[1], green[1], blue[1]) > 0.95


def test_gates_have_a_panel_each():
    found = record()
    figure = pictures.gates_figure(found, [0, 2], words(5))
    panels = {ax.get_title(loc="left"): ax.get_images()[0].get_array() for ax in maps(figure)}
    expected = {
        "write strength, beta": found.write_strength,
        "share erased, e·k": found.erased_share,
        "kept of the state, a": found.decay,
    }
    assert panels.keys() == expected.keys()
    for name, values in panels.items():
        assert np.array_equal(np.asarray(values), expected[name][0, [0, 2]].detach().numpy())
    assert labels(maps(figure)[0].yaxis) == ["0", "2"]
    assert labels(maps(figure)[-1].xaxis) == words(5)


def test_spectra_and_norm():
    found = record("bidirectional", "sum")
    figure = pictures.state_figure(found, [0, 2], words(5))
    for head, ax in zip([0, 2], figure.axes):
        lines = [torch.tensor(np.asarray(line.get_ydata())) for line in ax.get_lines()]
        spectrum = found.singular_values[0, head]
        assert len(lines) == 4 + 1  # heads of width 4, and the norm
        for n, line in enumerate(reversed(lines[:-1])):
            assert torch.allclose(line.nan_to_num(0), spectrum[:, n], atol=1e-4 * found.singular_values.max())
        assert torch.allclose(lines[-1], spectrum.norm(dim=-1))
        assert ax.get_yscale() == "log" and labels(ax.xaxis) == words(5)
        assert not any("$" in label for label in labels(ax.yaxis))


def test_singular_values_as_good_as_0_are_left_out():
    spectra = torch.tensor([[[8.0, 1, 1e-5, 1e-5]], [[4, 7e-4, 1e-3, 0]]])
    shown = pictures.visible_singular_values(spectra)
    assert torch.equal(shown.nan_to_num(-1), torch.tensor([[[8.0, 1, -1]], [[4, -1, 1e-3]]]))


def test_one_head_has_the_picture_to_itself():
    figure = pictures.weights_figure(record(), [1], words(5), words(5))
    (ax,) = maps(figure)
    assert ax.get_title() == "head 1"


@pytest.mark.parametrize("tokens", [3, 60])
def test_labels_do_not_overlap(tokens):
    found = record(tokens=tokens)
    figure = pictures.weights_figure(found, HEAD_NUMBERS, words(tokens), words(tokens))
    figure.draw_without_rendering()
    for ax, axis in ((maps(figure)[0], "y"), (maps(figure)[2], "x")):
        boxes = [label.get_window_extent() for label in getattr(ax, f"{axis}axis").get_ticklabels()]
        edges = sorted((getattr(b, f"{axis}0"), getattr(b, f"{axis}1")) for b in boxes)
        assert len(edges) >= min(tokens, 10)
        assert all(end <= start for (_, end), (start, _) in zip(edges, edges[1:]))


def test_labels_are_text_as_it_is(tmp_path):
    """Dollar signs are no formulas, long words are cut."""
    odd = ["$x_1$", "$\\frac{", "a" * 40, "▁größer", "</s>"]
    figure = pictures.weights_figure(record(), [1], odd, odd)
    pictures.save(figure, tmp_path / "odd")
    assert labels(maps(figure)[0].yaxis) == [*odd[:2], "a" * 13 + "…", *odd[3:]]
    assert not any(label.get_parse_math() for label in maps(figure)[0].yaxis.get_ticklabels())


def test_files(tmp_path):
    settings = dict(matplotlib.rcParams)
    pictures.draw(record(rule="delta"), [0], words(5), words(5), tmp_path / "new" / "delta")
    pictures.draw(record(rule="sum"), [0], words(5), words(5), tmp_path / "sum")
    kinds = {f"decoder.0.{what}.{kind}" for what in ("weights", "state") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "sum").iterdir()} == kinds
    kinds |= {"decoder.0.gates.png", "decoder.0.gates.svg"}  # which the sum rule has not
    assert {path.name for path in (tmp_path / "new/delta").iterdir()} == kinds
    for path in (tmp_path / "new/delta").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert dict(matplotlib.rcParams) == settings


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in ("one", "two"):
        pictures.save(pictures.gates_figure(record(), [0], words(5)), tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
