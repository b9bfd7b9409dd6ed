"""Templates of the study's pages: what they escape, and that nothing is left out silently."""

import re

import jinja2
import pytest

from videoalign.miniature.study.demo_page import Pair, Picture
from videoalign.miniature.study.demo_table import Cell
from videoalign.miniature.study.pages import PAGES, render

EVIL = "<script>alert('&')</script>"


def values(**changes):
    """Values of the demo's report, with markup wherever a text comes from outside."""
    clip, chart = Picture(b"gif", "gif", EVIL), Picture(b"png", "png", EVIL)
    rows = [["arm", "VQ"], [EVIL, "0.5"]]
    return {
        "compared": {"prompts": 8, "samples": 2},
        **dict.fromkeys(("summary", "best", "best_text", "legend"), EVIL),
        "pairs": [Pair("median", gain, EVIL, (clip, clip)) for gain in (0.25, -0.5)],
        "arms": (["arm", "VQ"], [[Cell(EVIL, EVIL), Cell("0.9", "+0.4", sign)] for sign in (1, 0, -1)]),
        "details": f"table of {EVIL}",
        "extremes": {"VQ": [clip, clip]},
        "shown": {EVIL: EVIL},
        "films": [(EVIL, [clip])],
        "wins": chart,
        "sweeps": [
            {"name": EVIL, "chart": chart, "best": 10.0, "limit": 30.0},
            {"name": "b", "chart": chart, "best": 0.0, "limit": None},
        ],
        "folder": EVIL,
        **dict.fromkeys(("accuracies", "correlations", "rewards", "best_of", "stages"), rows),
        **changes,
    }


def test_texts_from_outside_are_escaped_in_html():
    page = render("report.html", **values())
    assert "<script" not in page and page.count("&lt;script&gt;") > 15
    assert not re.search(r'(src|href)="(?!data:image/(gif|png);base64,)', page)


def test_the_report_says_from_which_strength_a_reward_is_hacked():
    page = render("report.html", **values())
    assert "hacked from 30 on" in page and page.count("no hacking shown") == 1 and "best at 10;" in page


def test_the_report_leads_with_pairs_of_clips_and_then_the_table():
    page = render("report.html", **values())
    first, table, rest = page.index('class="pairs"'), page.index('class="arms"'), page.index("What happened")
    assert first < table < rest
    assert page[first:table].count("<img") == 4
    assert "gives the right clip 0.25 more" in page and "gives the right clip 0.50 less" in page
    assert [page[table:rest].count(f'<td class="{name}">') for name in ("up", "down")] == [1, 1]
    assert page[table:rest].count('<tr class="best">') == 3  # the rows of the algorithm that the clips are of


def test_a_value_that_is_missing_is_an_error():
    given = values()
    del given["films"]
    with pytest.raises(jinja2.UndefinedError, match="films"):
        render("report.html", **given)


def test_pictures_are_inside_of_the_page():
    assert Picture(b"\x00\xff", "png", "").address == "data:image/png;base64,AP8="
    clip, chart = (Picture(b"", kind, "") for kind in ("gif", "png"))
    assert clip.clip and not chart.clip


def test_markdown_is_not_escaped():
    """Only HTML is: a page in Markdown shows < and & as they are."""
    assert PAGES.autoescape("report.html") and not PAGES.autoescape("results.md.j2")
    cell = {"letter": "a", "title": "x < y & z", "seeds": 1, "figure": False, "table": "", "claims": "| a |", "rows": 1}
    texts = ("reading", "questions", "judge", "advice", "undecided", "designs", "best", "tuning", "trials", "oracle")
    given = {
        **dict.fromkeys(texts, ""),
        "tally": "none",
        "chance": "Chance < 1.",
        "most": 1,
        "reach": None,
        "videos": 8,
    }
    page = render("results.md.j2", **given, folder="f", cells=[cell])
    assert "## (a) x < y & z\n\n1 seed.\n\n<details" in page and "\n| a |\n" in page
    assert "\nnone. Chance < 1.\n" in page
