"""Tables and charts in one style, and a notebook's matplotlib that importing the package leaves alone."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import videoalign
from helpers import syntax
from videoalign.callbacks.plots import (
    BLUE,
    DPI,
    LINES,
    ORANGE,
    bars,
    curve,
    legend_below,
    markdown_table,
    panels,
    pixels,
    reference_line,
    save_png,
    text_table,
)
from videoalign.callbacks.run_media import TensorBoardMedia
from videoalign.models.intervals import Interval

ROOT = Path(videoalign.__file__).parent
FOLDERS = ("models", "datamodules", "callbacks", "alignment", "commands", "miniature", "annotation")
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])

IMPORT_ALL = """
import importlib, sys
import matplotlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(matplotlib.get_backend())
"""


# --- what importing does ----------------------------------------------------------------------------------------------


def test_importing_every_module_leaves_the_backend_alone():
    names = (file.relative_to(ROOT.parent).with_suffix("").parts for file in FILES if file.name != "__main__.py")
    modules = [".".join(name[:-1] if name[-1] == "__init__" else name) for name in names]
    environment = {**os.environ, "MPLBACKEND": "svg", "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "svg" and len(modules) > 120


def test_no_module_imports_pyplot():
    """Lightning's torchmetrics imports it, so that it cannot be asked for among the imported modules."""
    for file in FILES:
        for node in ast.walk(syntax(file)):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            assert not any("pyplot" in name for name in [*names, getattr(node, "module", None) or ""]), file
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "matplotlib.use"), file


def test_charts_are_no_figures_of_the_process(tmp_path):
    before = plt.get_fignums()
    figure, (axis,) = panels()
    curve(axis, [1, 2], [Interval.over([0.1]), Interval.over([0.2])], "a")
    save_png(figure, tmp_path / "a.png")
    with SummaryWriter(str(tmp_path / "events")) as writer:
        TensorBoardMedia(writer).figure("chart", figure, 3)
    assert plt.get_fignums() == before


# --- tables -----------------------------------------------------------------------------------------------------------


def test_text_is_aligned_to_the_left_in_the_first_column_and_to_the_right_in_others():
    assert text_table(["", "pairs"], [["a name", "7"], ["b", "12345678"]]).splitlines() == [
        "           pairs",
        "a name         7",
        "b       12345678",
    ]


def test_markdown_keeps_its_columns_whatever_the_cells_hold():
    lines = markdown_table(["arm", "wins"], [["a|b", "0.5"], ["", "1"]]).splitlines()
    assert lines == ["| arm | wins |", "| --- | --- |", r"| a\|b | 0.5 |", "|  | 1 |"]


# --- charts -----------------------------------------------------------------------------------------------------------


def drawn_ends(axis):
    """Ends of all error bars, as (low, high)."""
    collections = (lines for c in axis.containers if hasattr(c, "has_yerr") for lines in c.lines[2])
    return [tuple(segment[:, 1]) for lines in collections for segment in lines.get_segments()]


def test_bars_have_their_heights_and_intervals():
    _, (axis,) = panels()
    series = {"a": [Interval(0.5, 0.4, 0.7), Interval(0.6, math.nan, math.nan)], "b": [Interval(0.1, 0.0, 0.3)] * 2}
    bars(axis, ["x", "y"], series, [BLUE, ORANGE])
    assert [bar.get_height() for bar in axis.patches] == [0.5, 0.6, 0.1, 0.1]
    assert drawn_ends(axis)[:2] == [pytest.approx((0.4, 0.7)), pytest.approx((0.6, 0.6))]
    places = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
    assert places == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["x", "y"]


def test_bars_of_nan_are_left_out_and_take_no_room():
    figure, (axis,) = panels()
    nothing = Interval(math.nan, math.nan, math.nan)
    bars(axis, ["x", "y"], {"a": [Interval(0.5, 0.4, 0.7), nothing], "b": [nothing] * 2}, [BLUE, ORANGE])
    (bar,) = axis.patches
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(0)
    legend_below(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]


def test_lying_bars_begin_at_the_top():
    _, (axis,) = panels()
    bars(axis, ["x", "y"], {"a": [Interval(0.5, 0.4, 0.7), Interval(0.2, 0.1, 0.3)]}, [BLUE], horizontal=True)
    assert [bar.get_width() for bar in axis.patches] == [0.5, 0.2]
    assert axis.get_ylim()[0] > 1 > 0 > axis.get_ylim()[1]


@pytest.mark.parametrize(("runs", "points", "reach"), [(1, 0, False), (2, 2, False), (3, 0, True)])
def test_few_runs_are_points_and_many_are_an_interval(runs, points, reach):
    """The interval of two runs is 13 standard errors wide to each side, and of one there is none."""
    _, (axis,) = panels()
    value = Interval.over([0.1 * i for i in range(runs)])
    curve(axis, [1.0], [value], "a")
    dots = [line for line in axis.lines if line.get_marker() == "."]
    assert sum(len(line.get_ydata()) for line in dots) == points
    (ends,) = drawn_ends(axis)
    assert ends == pytest.approx((value.low, value.high) if reach else (value.mean, value.mean))


def test_lines_differ_from_each_other_and_from_the_reference():
    _, (axis,) = panels()
    for number in range(len(LINES)):
        curve(axis, [0, 1], [Interval.over([0.1 * number] * 3)] * 2, str(number))
    reference_line(axis, 0.5, "chance")
    colours = [line.get_color() for line in axis.lines if line.get_linestyle() in ("-", "--")]
    assert len(colours) == len({*colours}) == len(LINES) + 1


def test_a_chart_is_the_same_in_a_file_and_in_tensorboard(tmp_path):
    figure, (axis,) = panels(size=(4, 3))
    reference_line(axis, 0.5)
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (4 * DPI, 3 * DPI)
    shown = pixels(figure)
    assert shown.shape == (300, 400, 3) and shown.dtype == np.uint8 and len(np.unique(shown)) > 10
    with SummaryWriter(str(tmp_path / "events")) as writer:
        TensorBoardMedia(writer).figure("chart", figure, 3)
    (event,) = EventAccumulator(str(tmp_path / "events")).Reload().Images("chart")
    assert (event.step, event.width, event.height) == (3, 400, 300)
