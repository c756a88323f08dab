"""The two renderers against closed forms: where points, bands and ticks stand, and that text stays text."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from itertools import pairwise

import pytest

from qies.errors import UserError
from qies.plotting import GREY, Axis, Band, Figure, Line, Note, Panel, Points, Style, style, styles
from qies.plotting.axes import linear_ticks, log_ticks, make_scale, si
from qies.plotting.static import DASHES, SYMBOLS
from qies.plotting.style import KNOWN, PALETTE
from qies.presets import ARMS

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '</script><script>alert("x")</script>&<b>'


def figure(*marks, x=None, y=None):
    x, y = x or Axis("compute (FLOPs)", True, 1.0, 1e4), y or Axis("loss (nats)", False, 0.0, 10.0)
    return Figure("a figure", [Panel(x, y, marks)])


def parsed(drawn):
    return ElementTree.fromstring(drawn.svg())


def moved(root):
    """Centres of the markers, in order."""
    return [(float(e.get("x")), float(e.get("y"))) for e in root.iter(f"{SVG}use")]


def drawn_in(root, colour):
    """The paths below the axes' clip that are drawn or filled in a colour."""
    found = [e for e in root.iter(f"{SVG}path") if e.get("clip-path") and colour.lower() in e.get("style")]
    return [[float(v) for v in re.findall(r"-?[\d.]+", e.get("d"))] for e in found], [e.get("d") for e in found]


def area(root):
    rect = root.find(f".//{SVG}clipPath/{SVG}rect")
    left, top, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
    return left, top, left + width, top + height


def test_points_stand_where_a_log_and_a_linear_axis_put_them():
    root = parsed(figure(Points([1, 10, 100, 1e4], [0, 2.5, 5, 10])))
    left, top, right, bottom = area(root)
    for (x, y), (across, up) in zip(moved(root), ((0, 0), (1 / 4, 1 / 4), (1 / 2, 1 / 2), (1, 1)), strict=True):
        assert x == pytest.approx(left + across * (right - left), abs=0.11)
        assert y == pytest.approx(bottom - up * (bottom - top), abs=0.11)


def test_what_is_not_known_or_outside_is_not_drawn():
    marks = Points([None, 10, -1, 1e6, 10], [1, None, 1, 1, 99]), Line([1, 10, 100, 1e3], [1, 2, None, 3])
    root = parsed(figure(*marks))
    assert moved(root) == []
    _, [line] = drawn_in(root, style(0).colour)
    assert line.count("M") == 2 and line.count("L") == 1  # broken at the gap
    assert "nan" not in figure(*marks).svg()


def test_a_band_is_closed_clipped_where_open_and_broken_at_a_gap():
    band = Band([1, 10, 100, 1000, 1e4], [2, 2, None, 0, 4], [3, None, None, 99, 5], style(1))
    assert band.segments(1.0, 10.0) == [([1, 10], [2, 2], [3, 10.0]), ([1000, 1e4], [1.0, 4], [10.0, 5])]
    shown = figure(band, Line([1, 1e4], [1, 9]))
    left, top, right, bottom = area(parsed(shown))
    [corners, _], _ = drawn_in(parsed(shown), style(1).colour)
    assert shown.svg().count("opacity: 0.16") == 2
    height, quarter = bottom - top, left + (right - left) / 4
    expected = [left, bottom - 0.3 * height, quarter, top, quarter, bottom - 0.2 * height, left, bottom - 0.2 * height]
    assert corners == pytest.approx(expected, abs=0.11)
    [one, two] = [t for t in shown.plotly()["data"] if t.get("fill") == "toself"]
    assert one["x"] == [1, 10, 10, 1] and one["y"] == [3, 10.0, 2, 2]
    assert two["y"] == [10.0, 5, 4, 0]


def test_error_bars_reach_their_ends_in_both_renderers():
    shown = figure(Points([100], [5], lo=[2.5], hi=[7.5]))
    _, top, _, bottom = area(parsed(shown))
    [[_, low, _, high]], _ = drawn_in(parsed(shown), style(0).colour)
    assert (low, high) == pytest.approx((bottom - (bottom - top) / 4, top + (bottom - top) / 4), abs=0.11)
    assert [y for _, y in moved(parsed(shown))][:2] == pytest.approx([low, high])  # a cap at either end
    [trace] = shown.plotly()["data"]
    assert trace["error_y"]["array"] == trace["error_y"]["arrayminus"] == [2.5]


def test_plotly_gets_the_same_ranges_ticks_and_text():
    shown = figure(Points([1, 100], [1, 9], "arm", style(2), ["one", "two"]), Note(100, 9, "far"))
    layout, (entry, points) = shown.plotly()["layout"], shown.plotly()["data"]
    assert layout["xaxis"]["type"] == "log" and layout["xaxis"]["range"] == [0, 4]
    assert layout["yaxis"]["type"] == "linear" and layout["yaxis"]["range"] == [0, 10]
    assert layout["xaxis"]["title"]["text"] == "compute (FLOPs)"
    words = [e.text for e in parsed(shown).iter(f"{SVG}text")]
    assert set(layout["xaxis"]["ticktext"]) <= set(words) and {"arm", "far"} <= set(words)
    assert entry["x"] == [None] and entry["showlegend"] and entry["legendgroup"] == points["legendgroup"] == "arm"
    assert points["text"] == ["one", "two"] and not points["showlegend"]
    [note] = layout["annotations"]
    assert (note["x"], note["y"]) == (2, 9)  # plotly wants the logarithm


def test_markers_of_a_crowd_are_smaller():
    few, many = (figure(Points([10] * n, [5] * n)) for n in (3, 200))
    assert len(moved(parsed(few))) == 3 and len(moved(parsed(many))) == 200
    outlines = [root.find(f".//{SVG}path[@id]") for root in (parsed(few), parsed(many))]
    wide = [max(float(v) for v in re.findall(r"[\d.]+", path.get("d"))) for path in outlines]
    assert wide[1] == pytest.approx(0.6 * wide[0], rel=0.02)
    assert few.plotly()["data"][0]["marker"]["size"] > many.plotly()["data"][0]["marker"]["size"]


def test_panels_lie_side_by_side_and_do_not_meet():
    panel = Panel(Axis("x"), Axis("y"), [Points([1, 2], [1, 2])])
    shown = Figure("grid", [panel] * 5, columns=3)
    layout = shown.plotly()["layout"]
    ends = [layout[f"xaxis{i}"]["domain"] for i in ("", 2, 3)]
    assert ends[0][0] == 0 and ends[2][1] == 1 and ends[0][1] < ends[1][0] and ends[1][1] < ends[2][0]
    assert layout["yaxis"]["domain"][0] > layout["yaxis5"]["domain"][1]
    assert {t["xaxis"] for t in shown.plotly()["data"]} == {"x", "x2", "x3", "x4", "x5"}
    root = parsed(shown)
    clips = [e.get("id") for e in root.iter(f"{SVG}clipPath")]
    assert len(set(clips)) == 5 and len(moved(root)) == 10
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 < x < width and 0 < y < height for x, y in moved(root))


def test_text_of_any_kind_stays_text(tmp_path):
    marks = Points([1], [1], EVIL, hover=[EVIL]), Line([1, 2], [1, 2], EVIL), Note(1, 1, EVIL)
    shown = Figure(EVIL, [Panel(Axis(EVIL, ticks={1.0: EVIL}), Axis(EVIL), marks)])
    root = parsed(shown)
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "svg", "title", "rect", "clipPath", "g", "path", "text", "use", "defs",
    }  # fmt: skip
    assert sum(e.text == EVIL for e in root.iter()) == 6  # title, two axes, a tick, the legend, the note
    assert "<" not in shown.json() and "&" not in shown.json()
    assert json.loads(shown.json()) == shown.plotly()
    assert all("<" not in t.get("name", "") + "".join(t.get("text", [])) for t in shown.plotly()["data"])
    text = shown.save(tmp_path / "evil.html").read_text()
    assert text.count("<script") == text.count("</script>") and "alert" in text and '<script>alert("x")' not in text


def test_characters_that_no_font_or_no_file_holds_are_drawn_without_a_word(recwarn):
    odd = "\u6f22 \x1b[31m \ud800"
    marks = Points([1, 2], [1, 2], odd), Line([1, 2], [1, 2], "law"), Note(1, 1, odd)
    root = parsed(Figure(odd, [Panel(Axis(odd, ticks={1.0: odd}), Axis(odd), marks)]))
    assert sum(e.text == "\u6f22 \ufffd[31m \ufffd" for e in root.iter()) == 6
    assert not recwarn.list


def test_an_svg_asks_for_nothing_and_names_its_colours():
    text = figure(Points([1], [1], "a")).svg()
    assert text.count("http") == 1 and "<script" not in text and "<style" not in text
    assert all(link.startswith("#") for link in re.findall('href="(.*?)"', text))
    assert set(re.findall(r"url\((.)", text)) == {"#"} and style(0).colour.lower() in text


def test_a_figure_is_drawn_alike_whatever_the_readers_settings_are():
    import matplotlib

    shown = figure(Points([1, 10], [1, 2], "a $x$"), Line([1, 100], [1, 9], "b"))
    text, pdf = shown.svg(), shown.pdf()
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}
    ):
        assert shown.svg() == text and shown.pdf() == pdf
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf
    other = Figure("another figure", shown.panels)
    assert not set(re.findall('id="(.*?)"', text)) & set(re.findall('id="(.*?)"', other.svg()))  # both fit in one page


def test_no_text_of_a_figure_is_cut_or_overlaps_on_an_axis():
    names = [f"an arm with a long name {i}" for i in range(7)]
    marks = [Line([1, 1e4], [i, i + 1], name, style(i)) for i, name in enumerate(names)]
    root = parsed(figure(*marks, Note(9e3, 5, "a long remark near the right edge")))
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = []
    for e in root.iter(f"{SVG}text"):
        if e.get("x") is None or e.get("transform"):
            continue
        size, anchor = re.search(r"font-size: ([\d.]+)px; text-anchor: (\w+)", e.get("style")).groups()
        x, y, wide = float(e.get("x")), float(e.get("y")), 0.56 * float(size) * len(e.text)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        assert left >= 0 and left + wide <= width and 0 < y < height, e.text
        boxes.append((left, left + wide, y))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert abs(a[2] - b[2]) >= 12 or a[1] <= b[0] or b[1] <= a[0]


def test_notes_at_one_place_move_apart():
    root = parsed(figure(*[Note(10, 5, f"run {i}") for i in range(4)], Line([1, 1e4], [0, 10])))
    heights = sorted(float(e.get("y")) for e in root.iter(f"{SVG}text") if e.text.startswith("run"))
    assert all(b - a >= 12 for a, b in pairwise(heights))


def test_styles_differ_in_colour_marker_and_dash_and_arms_keep_theirs():
    looks = [style(i) for i in range(6)]
    for part in ("colour", "symbol", "dash"):
        assert len({getattr(look, part) for look in looks}) == 6
    assert {look.symbol for look in looks} <= set(SYMBOLS) and {look.dash for look in looks} <= set(DASHES)
    assert styles(["new", "qies"])["qies"] == styles(["qies"])["qies"] == style(KNOWN.index("qies"))
    assert GREY.colour not in PALETTE
    assert set(ARMS) == set(KNOWN) and len({styles(ARMS)[arm].colour for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize("page", ["#ffffff", "#14161a"])  # the report's light and dark background
def test_every_colour_has_a_contrast_of_3_to_1_on_both_pages(page):
    def luminance(colour):  # WCAG 2.2, relative luminance of sRGB
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    assert page in (files("qies.report") / "template.html").read_text()
    for colour in (*PALETTE, GREY.colour):
        dark, light = sorted(luminance(c) + 0.05 for c in (colour, page))
        assert light / dark >= 3, colour


def test_legend_joins_line_and_marker_of_a_name():
    legend = figure(Line([1], [1], "a"), Points([1], [1], "a"), Points([1], [1], "b", Style("#000000"))).legend()
    assert {name: (entry.line, entry.marker) for name, entry in legend.items()} == {
        "a": (True, True),
        "b": (False, True),
    }


@pytest.mark.parametrize(
    ("low", "high"),
    [(3.6, 5.1), (4.0, 4.02), (3e4, 5e5), (1e9, 1e15), (1e-4, 0.9), (1, 1e30), (2, 13), (0.93, 1.31), (1e11, 1.5e13)],
)
@pytest.mark.parametrize("most", [4, 6])
def test_log_ticks_lie_in_range_and_are_few_and_distinct(low, high, most):
    ticks = log_ticks(low, high, most)
    assert 2 <= len(ticks) <= most
    assert all(low <= value <= high for value in ticks)
    assert len(set(ticks.values())) == len(ticks)


def test_log_ticks_are_round():
    assert log_ticks(1e16, 1e22, 7) == {10.0**p: f"1e{p}" for p in range(16, 23)}
    assert list(log_ticks(2e4, 6e5, 6).values()) == ["20k", "50k", "100k", "200k", "500k"]


def test_linear_ticks_are_round_few_and_written_with_the_digits_they_need():
    assert list(linear_ticks(-0.034, 0.011, 6).values()) == ["-0.03", "-0.02", "-0.01", "0.00", "0.01"]
    assert list(linear_ticks(0, 10, 6)) == [0, 2, 4, 6, 8, 10]
    assert list(linear_ticks(0, 3e6, 4).values()) == ["0", "1M", "2M", "3M"]


@pytest.mark.parametrize(
    ("value", "significant", "text"),
    [
        (960e6, 2, "960M"),
        (2e8, 1, "200M"),
        (999.9e6, 3, "1G"),
        (4.39e12, 3, "4.39T"),
        (3e21, 3, "3e21"),
        (0.5, 3, "0.5"),
    ],
)
def test_si_never_falls_into_powers_of_ten_within_its_letters(value, significant, text):
    assert si(value, significant) == text


def test_a_range_holds_the_data_with_a_margin_and_fixed_ends_stay():
    scale = make_scale([1.0, 100.0], True, None, None, None, 6)
    assert (scale.low, scale.high) == pytest.approx((100**-0.05, 100**1.05))
    assert scale.at(10.0) == pytest.approx(0.5) and math.isnan(scale.at(-1.0))
    assert make_scale([3.0], False, 0.0, None, None, 6).low == 0.0
    assert make_scale([5.0, 5.0], False, None, None, None, 6).at(5.0) == pytest.approx(0.5)


def test_nothing_to_draw_is_an_error_not_an_empty_picture():
    for marks in ([], [Points([None], [1.0])], [Points([-1.0], [1.0])]):
        with pytest.raises(ValueError, match="nothing to draw"):
            Figure("x", [Panel(Axis("x", True), Axis("y"), marks)]).svg()


def test_save_refuses_what_it_cannot_write(tmp_path):
    shown = figure(Points([1], [1]))
    assert shown.save(tmp_path / "a.svg").read_text() == shown.svg()
    assert shown.save(tmp_path / "a.pdf").read_bytes() == shown.pdf()
    with pytest.raises(UserError, match=r"none of \.svg, \.pdf and \.html"):
        shown.save(tmp_path / "a.png")
    with pytest.raises(UserError, match="not a directory"):
        shown.save(tmp_path / "none" / "a.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.svg"]
