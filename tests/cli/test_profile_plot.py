"""Pictures of a profile: what is in them, as text and as a figure."""

from __future__ import annotations

import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from conflayers_cli.profile.plot_data import make_drawing
from conflayers_cli.profile.plot_text import MAX_COLUMNS, MAX_ROWS, render_text
from conflayers_cli.profile.schema import Profile, SkipSection
from conflayers_cli.profile.tensors import Tensors, hash_content
from tests.cli.conftest import Run
from tests.profile.test_schema import BARE

DEPTH = 12
INNER = DEPTH - 2
PROFILE = Profile(
    model=BARE.model.model_copy(update={"depth": DEPTH}),
    skip=SkipSection(attention=(2, 4), mlp=(4,)),
    draft=BARE.draft,
)


def proposals(count: int = 3) -> Tensors:
    """As ConfLayers leaves them: layer 3 (index 2 among the inner ones) is always left out."""
    z = np.tile(np.linspace(-1, 2, INNER), (count, 1))
    selected = np.zeros((count, DEPTH), np.uint8)
    selected[:, 3] = 1
    return {
        "attention_confidence": z + 1,
        "mlp_confidence": z + 1,
        "z": z,
        "threshold": np.zeros((count, INNER)),
        "selected": selected,
    }


def trials(count: int = 4) -> Tensors:
    left_out = np.zeros((count, DEPTH), np.uint8)
    left_out[:, 1:6] = 1
    return {
        "trial_attention": left_out,
        "trial_mlp": left_out,
        "trial_drafted": np.array([10] * (count - 1) + [0]),
        "trial_accepted": np.arange(count),
        "trial_speedup": np.array([*np.linspace(0.5, 1.5, count - 1), np.nan]),
    }


def text_of(tensors: Tensors, **options: Any) -> list[str]:
    return render_text(make_drawing(PROFILE, tensors), **options)


def test_the_plan_is_drawn_whatever_else_there_is() -> None:
    title, attention, mlp, ruler = text_of({})
    assert "left out" in title
    assert attention.split() == ["attention", "██·█·███████"]
    assert mlp.split() == ["MLP", "████·███████"]
    assert ruler.index("10") == attention.index("█") + 10


def test_a_proposal_has_its_columns_and_its_threshold() -> None:
    lines = text_of(proposals())
    at = next(i for i, line in enumerate(lines) if line.startswith("confidence of proposal 3 of 3"))
    chart = [line.ljust(12 + INNER)[12:] for line in lines[at + 1 : at + 9]]
    heights = [sum(row[k] in "█░─" for row in chart) for k in range(INNER)]
    assert heights == sorted(heights) and heights[-1] == 8
    assert all(sum(row[k] == "─" for row in chart) == 1 for k in range(INNER))
    assert "░" in {row[2] for row in chart} and "█" not in {row[2] for row in chart}
    assert "░" not in "".join(row[:2] + row[3:] for row in chart)
    assert lines[at + 1].split()[0] == "+2.0" and lines[at + 8].split()[0] == "-1.0"


def test_every_proposal_has_a_row_and_of_many_some() -> None:
    lines = text_of(proposals())
    at = next(i for i, line in enumerate(lines) if line.startswith("confidence by proposal"))
    rows = [line.split() for line in lines[at + 1 : at + 4]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(row[1][2] == "·" and row[1].count("·") == 1 for row in rows)
    many = text_of(proposals(500))
    numbers = [line.split()[0] for line in many[many.index("") :] if line[:9].strip().isdigit()]
    assert numbers[0] == "1" and "500" in numbers and len(numbers) <= MAX_ROWS + 2


def test_the_proposal_shown_is_that_of_the_best_set() -> None:
    """Row k of the proposals is behind set k + 1: the first set is the balanced one."""
    found = make_drawing(PROFILE, {**proposals(), **trials()})
    assert found.proposals is not None and found.proposals.shown == 1
    assert make_drawing(PROFILE, proposals()).proposals is not None


def test_the_search_has_a_column_for_each_set() -> None:
    lines = text_of(trials())
    title, share, acceptance, speedup = lines[-4:]
    assert title == "the search, 4 sets from left to right"
    assert share.split() == ["skipped", "share", "████", "50%"]
    assert acceptance.rstrip().endswith("0%–20%") and "▁" in acceptance
    assert speedup.rstrip().endswith("0.50×–1.50×")
    assert "▁" in speedup and "█" in speedup
    wide = text_of(trials(1000))[-1]
    assert len(wide) < MAX_COLUMNS + 40 and "0.50×–1.50×" in wide


def test_without_blocks_pictures_are_ascii() -> None:
    """All but the words: what an encoding lacks of these is escaped when it is written."""
    lines = text_of({**proposals(), **trials()}, unicode=False)
    drawn = [line for line in lines if not line.startswith(("layers", "confidence", "the search"))]
    assert "".join(drawn).replace("×", "").isascii()
    assert any("##.#.#######" in line for line in drawn)


@pytest.mark.parametrize("name", ["agreement", "matchness"])
def test_strategies_that_do_not_decode_show_what_they_judged_by(name: str) -> None:
    tensors = trials()
    tensors["trial_drafted"] = np.zeros(4)
    tensors[f"trial_{name}"] = np.linspace(0.2, 0.9, 4)
    curves = {curve.name: curve for curve in make_drawing(PROFILE, tensors).curves}
    assert list(curves) == ["skipped share", name, "expected speed-up"]


def test_greedys_agreement_without_each_sub_layer() -> None:
    alone = np.full((2, DEPTH), np.nan)
    alone[:, 1:-1] = np.linspace(0.1, 0.9, INNER)
    lines = text_of({"agreement_without": alone})
    assert "agreement with a sub-layer alone left out (▁ 10% … █ 90%)" in lines
    assert lines[-3].startswith("attention   ▁")


def test_tensors_of_another_shape_are_not_drawn() -> None:
    wrong: Tensors = {
        **{name: values[:, :-1] for name, values in proposals().items()},
        "trial_speedup": np.ones((2, 2)),
        "trial_attention": np.ones((2, 3)),
        "agreement_without": np.array(["x"]),
    }
    drawing = make_drawing(PROFILE, wrong)
    assert drawing.proposals is None and drawing.alone is None and not drawing.curves
    short = {**proposals(), "z": proposals()["z"][:1]}
    assert make_drawing(PROFILE, short).proposals is None


FULL_TENSORS = {**proposals(), **trials()}


def written(folder: Path, tensors: Tensors | None = FULL_TENSORS) -> Path:
    path = folder / "p.yaml"
    update: dict[str, Any] = {}
    if tensors is not None:
        content = save(tensors)
        (folder / "p.safetensors").write_bytes(content)
        update = {"tensors": "p.safetensors", "tensors_sha256": hash_content(content)}
    PROFILE.model_copy(update=update).save(path)
    return path


def test_plot_prints_text(run: Run, tmp_path: Path) -> None:
    result = run("profile", "plot", written(tmp_path))
    assert (result.code, result.err) == (0, "")
    for part in ("attention", "confidence of proposal 2 of 3", "expected speed-up"):
        assert part in result.out


def test_a_profile_without_tensors_says_so_in_one_line(run: Run, tmp_path: Path) -> None:
    result = run("profile", "plot", written(tmp_path, None))
    assert result.code == 0 and "██·█·███████" in result.out
    assert result.err.count("\n") == 1 and "names no tensors" in result.err
    result = run("profile", "plot", written(tmp_path, {"other": np.ones(3)}))
    assert result.code == 0 and "nothing to draw" in result.err


def test_tensors_of_another_search_are_refused(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "p.safetensors").write_bytes(save({"z": np.ones(3)}))
    result = run("profile", "plot", path)
    assert (result.code, result.out) == (2, "")
    assert "is not the file written with this profile" in result.err


@pytest.mark.parametrize("tensors", [FULL_TENSORS, None], ids=["all", "plan"])
@pytest.mark.parametrize("dark", [[], ["--dark"]], ids=["light", "dark"])
def test_figures_of_every_format(
    run: Run, tmp_path: Path, tensors: Tensors | None, dark: list[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = written(tmp_path, tensors)
    for form in ("png", "svg", "pdf"):
        output = tmp_path / f"p.{form}"
        contents = []
        for _ in range(2):
            result = run("profile", "plot", path, "--output", output, *dark)
            assert (result.code, result.out) == (0, ""), result.err
            contents.append(output.read_bytes())
        assert contents[0] == contents[1]  # fit for version control
    width, height = struct.unpack(">II", (tmp_path / "p.png").read_bytes()[16:24])
    assert width == 3.4 * 300 and height > 200
    root = ElementTree.fromstring((tmp_path / "p.svg").read_text())
    assert root.attrib["width"].startswith("244.8")  # points: 3.4 inches
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")


def test_light_and_dark_are_different_pictures(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = written(tmp_path)
    run("profile", "plot", path, "-o", tmp_path / "l.svg")
    run("profile", "plot", path, "-o", tmp_path / "d.svg", "--dark")
    light, dark = ((tmp_path / f"{name}.svg").read_text() for name in "ld")
    assert "fill: #ffffff" in light and "fill: #14171c" in dark and "#14171c" not in light


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output", "p.gif"], "allowed are .png, .svg, .pdf"),
        (["--output", "nowhere/p.png"], "nowhere does not exist"),
        (["--dark"], "--dark goes with --output"),
    ],
)
def test_what_can_not_be_drawn(run: Run, tmp_path: Path, arguments: list[str], told: str) -> None:
    result = run("profile", "plot", written(tmp_path), *arguments)
    assert (result.code, result.out) == (2, "")
    assert told in result.err and result.err.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("profile", "plot", written(tmp_path), "--output", "p.png")
    assert (result.code, result.out) == (2, "")
    assert "pip install 'conflayers[plot]'" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "p.png").exists()
