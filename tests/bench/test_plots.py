"""Pictures: what is drawn, that it fits, and that it can be told apart without colour."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.bench.plots import bench_figure, speed_interval
from conflayers_cli.bench.schema import BenchDocument
from conflayers_cli.errors import InputError
from conflayers_cli.utils import plotting
from conflayers_cli.utils.plotting import Theme, check_plot, save_plot
from conflayers_cli.utils.statistics import Interval
from tests.benched import checked

pytest.importorskip("matplotlib")

BEGIN = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
CATEGORIES = ("qa", "qa", "qa", "math", "math", "math")


def bench(**more: Any) -> BenchDocument:
    return checked([1.0, 2.0, 4.0, 1.0, 1.5, 1.2], **{"categories": CATEGORIES, **more})


def drawn(document: BenchDocument, path: Path, theme: Theme = Theme.LIGHT) -> Any:
    """The figure, having been drawn."""
    kept = []

    def draw(wanted: Theme) -> Any:
        kept.append(bench_figure(document, wanted))
        return kept[0]

    save_plot(path, theme, draw)
    return kept[0]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
@pytest.mark.parametrize("theme", list(Theme))
def test_the_same_figures_give_the_same_file(tmp_path: Path, suffix: str, theme: Theme) -> None:
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    drawn(bench(), one, theme)
    drawn(bench(), other, theme)
    assert one.read_bytes().startswith(BEGIN[suffix.lower()])
    assert one.read_bytes() == other.read_bytes()


def test_the_panels_hold_the_figures(tmp_path: Path) -> None:
    figure = drawn(bench(), tmp_path / "a.png")
    speeds, positions, times = figure.axes
    assert [text.get_text() for text in speeds.get_yticklabels()] == ["qa", "math", "all prompts"]
    markers = [line for line in speeds.get_lines() if line.get_marker() == "s"]
    assert [float(line.get_xdata()[0]) for line in markers] == pytest.approx([20.0, 12.0, 13.5])
    (rates,) = [line for line in positions.get_lines() if line.get_marker() == "o"]
    assert list(rates.get_xdata()) == [1, 2]
    assert list(rates.get_ydata()) == [100.0, 50.0]
    widths = {bar.get_label(): [patch.get_width() for patch in bar] for bar in times.containers}
    # six prompts at 10 tokens/s; with drafts, 400 ms of each run's drafting at that prompt's speed
    assert widths["full passes"][1] == pytest.approx(100.0)
    assert widths["drafting"][1] == 0.0
    assert widths["drafting"][0] / widths["full passes"][0] == pytest.approx(2 / 3)


def test_panels_without_figures_are_left_out(tmp_path: Path) -> None:
    document = bench()
    speculative = document.arms["speculative"].model_copy(
        update={"by_position": {}, "decoding": None}
    )
    vanilla = document.arms["vanilla"].model_copy(update={"decoding": None})
    bare = document.model_copy(
        update={"arms": {"vanilla": vanilla, "speculative": speculative}, "categories": {}}
    )
    (speeds,) = drawn(bare, tmp_path / "a.png").axes
    assert [text.get_text() for text in speeds.get_yticklabels()] == ["all prompts"]


NAMES = ("a very long category's name that goes on", "$x_1$", "\x1b[2J", "汉字", "", "_hidden")


def _ticks(axes: Any, way: int) -> list[Any]:
    """The labels that are drawn, along (0) or up (1): those within the axis."""
    labels = (axes.get_xticklabels(), axes.get_yticklabels())[way]
    low, high = sorted((axes.get_xlim(), axes.get_ylim())[way])
    return [label for label in labels if low <= label.get_position()[way] <= high]


@pytest.mark.parametrize("theme", list(Theme))
def test_nothing_is_cut_and_no_letter_is_small(tmp_path: Path, theme: Theme) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawn(bench(categories=NAMES), tmp_path / "a.png", theme)
    assert figure.get_figwidth() == plotting.WIDTH
    agg = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        agg.draw()
    canvas = agg.get_renderer()
    frame = figure.bbox
    boxes = []
    for axes in figure.axes:
        texts = [
            *(axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label),
            *(*_ticks(axes, 0), *_ticks(axes, 1), *axes.texts),
            *axes.get_legend().get_texts(),
        ]
        for text in (text for text in texts if text.get_text() and text.get_visible()):
            assert text.get_fontsize() >= 7
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                box = text.get_window_extent(canvas)
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text.get_text()
            boxes.append((text.get_text(), box))
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9)), (one, other)


def test_a_hundred_categories_are_cut_short(tmp_path: Path) -> None:
    many = checked([1.0] * 100, categories=[f"c{i}" for i in range(100)])
    speeds = drawn(many, tmp_path / "a.png").axes[0]
    assert len(speeds.get_yticklabels()) == 25


def _luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", list(Theme))
def test_colours_stand_out_from_the_paper(theme: Theme) -> None:
    assert _contrast(theme.ink, theme.paper) >= 7
    for colour in (theme.blue, theme.grey):
        assert _contrast(colour, theme.paper) >= 4.5
    assert _contrast(plotting.ORANGE, theme.paper) >= 2


def test_speed_intervals_are_over_prompts_or_runs() -> None:
    document = bench()
    assert speed_interval(document.prompts, "speculative").median == pytest.approx(13.5)
    two = speed_interval(document.prompts[:2], "speculative")
    assert (two.median, two.low, two.high) == pytest.approx((15.0, 10.0, 20.0))
    assert speed_interval(document.prompts[:2], "nobody") == Interval.of([])


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"must end with \.png, \.svg, \.pdf"):
        check_plot(tmp_path / name)


def test_without_matplotlib_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="plot needs matplotlib: pip install matplotlib"):
        check_plot(tmp_path / "a.png")
