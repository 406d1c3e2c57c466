"""Figures as PNG files. What is on them is asked of matplotlib's objects, what is in the files of the bytes."""

import math
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb

from launch.figures import HEAT_MAX, draw_curves, draw_heat_map, edges, leg_styles, shortened, write_figures
from launch.report_parts import Curve, Figure, HeatMap, Report

LEGS = ["base", "other"]
STEPS = list(range(100))
RUNS = [Curve(leg, f"{leg}-{run}", STEPS, [5.0 + run] * 100) for leg in reversed(LEGS) for run in (1, 2)]
LOSS = Figure("loss", "Loss", "step", "loss", RUNS)
MFU = Figure("mfu", "MFU", "step", "percent", [Curve("base", "base-1", [1, 2], [math.nan, math.nan])])
LOAD = HeatMap("load", "Load", [1, 2, 10], [[0.0, 1.0, 1.0], [5.0, 1.0, math.nan]])
REPORT = Report("Report", [], [], [], [LOSS, MFU], [LOAD, HeatMap("no_load", "Load", [], [])])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_style_of_the_user_changes_no_byte(tmp_path: Path) -> None:
    write_figures(REPORT, tmp_path / "plain")
    with matplotlib.rc_context({"lines.linewidth": 5, "font.size": 20, "axes.facecolor": "red"}):
        write_figures(REPORT, tmp_path / "styled")
        assert matplotlib.rcParams["font.size"] == 20
    assert contents(tmp_path / "styled") == contents(tmp_path / "plain")


def test_every_figure_and_heat_map_is_a_png_even_one_without_anything_to_show(tmp_path: Path) -> None:
    write_figures(REPORT, tmp_path / "figures")
    written = contents(tmp_path / "figures")
    assert sorted(written) == ["load.png", "loss.png", "mfu.png", "no_load.png"]
    assert all(content.startswith(b"\x89PNG") for content in written.values())


def test_figures_made_twice_are_the_same_bytes_and_do_not_name_what_made_them(tmp_path: Path) -> None:
    write_figures(REPORT, tmp_path / "one")
    write_figures(REPORT, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not any(b"tEXt" in content for content in contents(tmp_path / "one").values())


def test_a_figure_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loss.png").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("launch.figures.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_figures(REPORT, tmp_path)
    assert contents(tmp_path) == {"loss.png": b"old"}


def test_runs_of_a_leg_share_its_colour_and_its_one_entry_in_the_legend() -> None:
    styles = leg_styles(LEGS)
    canvas = draw_curves(LOSS, styles)
    drawn = [to_rgb(line.get_color()) for line in canvas.axes[0].lines]
    assert drawn == [to_rgb(styles[curve.leg].colour) for curve in RUNS]
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == LEGS


@pytest.mark.parametrize("canvas", [draw_curves(MFU, leg_styles(LEGS)), draw_heat_map(REPORT.heat_maps[1])])
def test_nothing_measured_is_said_in_the_middle(canvas: object) -> None:
    [text] = canvas.axes[0].texts
    assert (text.get_text(), text.get_position()) == ("not measured", (0.5, 0.5))
    assert not canvas.legends


def test_a_lone_point_is_seen() -> None:
    canvas = draw_curves(Figure("a", "A", "x", "y", [Curve("base", "base-1", [1], [1.0])]), leg_styles(LEGS))
    assert canvas.axes[0].lines[0].get_marker() == "o"


def test_names_are_neither_mathematics_nor_hidden(recwarn: pytest.WarningsRecorder) -> None:
    legs = ["_underscore", r"$\frac$", "a$b$"]
    figure = Figure("a", r"$\nonsense$", "$", "$_$", [Curve(leg, leg, [1], [1.0]) for leg in legs])
    canvas = draw_curves(figure, leg_styles(legs))
    canvas.draw_without_rendering()  # lays out every text, and raises for bad mathematics
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["_underscore", r"\$\frac\$", r"a\$b\$"]
    assert not list(recwarn)


def test_twenty_one_legs_look_different() -> None:
    legs = [f"leg {number}" for number in range(21)]
    assert len(set(leg_styles(legs).values())) == len(legs)


def test_a_long_name_keeps_both_ends() -> None:
    assert shortened("short") == "short"
    assert shortened("a" * 50 + "b" * 50) == "a" * 29 + "…" + "b" * 29


def test_an_even_load_is_the_middle_of_the_colours_whatever_was_measured() -> None:
    mesh = draw_heat_map(LOAD).axes[0].collections[0]
    red, green, blue, _ = mesh.to_rgba(1.0)
    assert red == green == blue
    assert mesh.get_clim() == (0.0, HEAT_MAX)
    red, _, blue, _ = mesh.to_rgba(1.5)
    assert red > blue
    red, _, blue, _ = mesh.to_rgba(0.5)
    assert red < blue


def test_a_cell_reaches_halfway_to_its_neighbours() -> None:
    assert edges([1, 2, 10]) == [0.5, 1.5, 6.0, 14.0]
    assert edges([7]) == [6.5, 7.5]
