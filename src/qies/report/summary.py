"""One small figure for a README: loss against parameters per arm, as a static SVG from the same records as the page."""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path

from qies.errors import UserError
from qies.report.charts import log_ticks, styles
from qies.report.records import Study, read_study

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 56, 60
# Marker outlines around the origin, in the order of the styles' symbols; a circle is an element of its own.
OUTLINES = {
    "square": "M-5-5H5V5H-5Z",
    "diamond": "M0-7L7 0L0 7L-7 0Z",
    "triangle-up": "M0-7L6.5 5H-6.5Z",
    "cross": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "x": "M-6-4L-4-6L0-2L4-6L6-4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0Z",
    "star": "M0-7L2-2L7-2L3 1L4.5 6L0 3L-4.5 6L-3 1L-7-2L-2-2Z",
}


def write_summary_svg(folder: Path, path: Path) -> Path:
    """Draw validation loss against non-embedding parameters of a study folder's finished runs to `path`
    (SVG).

    Log axes, one colour and shape an arm, its fitted power law where fits.json has one; light background, no
    script, no fonts, no links. Raises UserError when no run has finished.
    """
    study = read_study(Path(folder))
    points = {
        arm: [(run.params, run.loss) for run in study.done if run.arm == arm and run.params and run.loss]
        for arm in study.arms
    }
    points = {arm: runs for arm, runs in points.items() if runs}
    if not points:
        raise UserError(f"{folder} has no finished run to draw; run the study first")
    svg = "\n".join(_draw(study, points))
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(svg + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _draw(study: Study, points: dict[str, list[tuple[float, float]]]) -> list[str]:
    looks = styles(points)
    xs = [x for runs in points.values() for x, _ in runs]
    ys = [y for runs in points.values() for _, y in runs]
    x_low, x_high, y_low, y_high = min(xs) / 1.25, max(xs) * 1.25, min(ys) / 1.03, max(ys) * 1.03

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / x_low) / math.log(x_high / x_low)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / y_low) / math.log(y_high / y_low)

    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>Validation loss against parameters, study {escape(study.name)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"/></clipPath>',
        '<g stroke="#dfe2e6" fill="none">',
    ]
    x_ticks, y_ticks = log_ticks(x_low, x_high), log_ticks(y_low, y_high)
    out += [f'<path d="M{across(x):.1f} {TOP}V{floor}"/>' for x in x_ticks]
    out += [f'<path d="M{LEFT} {up(y):.1f}H{right}"/>' for y in y_ticks]
    out += ["</g>", '<g fill="#333a42">']
    out += [
        f'<text x="{across(x):.1f}" y="{floor + 20}" text-anchor="middle">{text}</text>' for x, text in x_ticks.items()
    ]
    out += [f'<text x="{LEFT - 8}" y="{up(y) + 5:.1f}" text-anchor="end">{text}</text>' for y, text in y_ticks.items()]
    out += [
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle">non-embedding parameters</text>',
        f'<text transform="translate(20 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        "validation loss (nats per token)</text>",
        "</g>",
    ]
    legend = LEFT
    for arm, runs in points.items():
        look = looks[arm]
        curve = study.curve(arm, "params")
        if curve:
            line = [f"{across(x):.1f} {up(y):.1f}" for x, y in zip(curve["x"], curve["loss"], strict=True)]
            out.append(
                f'<path d="M{"L".join(line)}" fill="none" stroke="{look.colour}" stroke-width="2" '
                'clip-path="url(#plot)"/>'
            )
        out += [_marker(look.symbol, look.colour, across(x), up(y)) for x, y in runs]
        out.append(_marker(look.symbol, look.colour, legend + 8, 30))
        out.append(f'<text x="{legend + 20}" y="35" fill="#333a42">{escape(arm)}</text>')
        legend += 44 + 8 * len(arm)
    return [*out, "</svg>"]


def _marker(symbol: str, colour: str, x: float, y: float) -> str:
    if symbol == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{OUTLINES[symbol]}" fill="{colour}"/>'
