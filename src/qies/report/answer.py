"""The page's first screen: which arm scales better, by how much, how sure that is, and in which regime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qies.analyses.formatting import estimate, fixed, number, si
from qies.analyses.induction import copying, in_words
from qies.analyses.records import Cell, Study, listed, mapping
from qies.config import INDUCTION_ONSET
from qies.mixers import mixer, names
from qies.scaling.comparison.copying import Copying, before_onset, set_in
from qies.scaling.comparison.result import plural
from qies.scaling.figures import INSIDE

Pair = dict[str, Any]
NOT_RECORDED = "Not recorded."


@dataclass(frozen=True)
class Answer:
    """`headline` in one sentence; `rows` of (question, answer)."""

    headline: str
    rows: list[tuple[str, str]]


def answer(study: Study) -> Answer | None:
    """The answer of the study's main pair of arms; None without a stored comparison of arms that have finished runs."""
    pair = study.main_pair
    if pair is None:
        return None
    arms = (pair["candidate"], pair["baseline"])
    cells = study.shared_cells(arms)
    if not cells:
        return None
    measured = [copying(study, arm, cells[-1]) for arm in arms]
    return Answer(
        _headline(pair, measured),
        [
            (f"Does {arms[0]} scale better?", _exponents(study, pair)),
            ("By how much?", _gains(pair)),
            ("How sure is it?", _certainty(study, pair, cells)),
            ("In which regime?", _regime(study, pair)),
            ("Which baseline?", _settings(study, arms)),
            ("Had in-context copying set in?", _copied(study, measured, cells[-1])),
        ],
    )


def _headline(pair: Pair, measured: list[Copying]) -> str:
    candidate, baseline, verdict = pair["candidate"], pair["baseline"], pair["verdict"]
    if before := before_onset(measured):
        return f"No headline: {before}."
    said = {
        "no difference": f"No significant difference between {candidate} and {baseline}.",
        f"{baseline} wins": f"The baseline wins: {baseline} needs less compute than {candidate} for the same loss.",
        f"{candidate} wins": f"{candidate} wins: it needs less compute than {baseline} for the same loss.",
    }
    return said.get(verdict, f"{candidate} against {baseline}: {verdict}.")


def _exponents(study: Study, pair: Pair) -> str:
    """Both arms' exponents in FLOPs, and whether the comparison's joint fit finds them different."""
    arms = (pair["candidate"], pair["baseline"])
    values = []
    for arm in arms:
        fit = study.fit(arm, "flops")
        low, high = [*listed(mapping(fit.get("ci")).get("alpha")), None, None][:2]
        value = estimate(mapping(fit.get("params")).get("alpha"), low, high, ".4f")
        values.append(f"{arm} {value}")
    return f"{_tested(pair)} Exponent of loss against FLOPs: {', '.join(values)}."


def _tested(pair: Pair) -> str:
    test = mapping(pair.get("shared_fit"))
    p, names = number(test.get("p")), [str(name) for name in listed(test.get("shared"))]
    if p is None or not names:
        return "Unknown: no test of equal exponents."
    how = f"F({test.get('restrictions')}, {_plain(test.get('dof'))}) = {si(test.get('statistic'))}, p = {p:.2g}"
    if p >= 1 - _level(pair):
        return f"Not shown: {' and '.join(names)} not significantly different ({how})."
    separate = mapping(test.get("separate"))
    ours, theirs = (number(mapping(separate.get(pair[k])).get("alpha")) for k in ("candidate", "baseline"))
    if names != ["alpha"] or ours is None or theirs is None:
        return f"The laws differ: {' and '.join(names)} significantly different ({how})."
    if ours > theirs:
        return f"Yes: its exponent is significantly larger ({how})."
    return f"No: the exponent of {pair['baseline']} is significantly larger ({how})."


def _gains(pair: Pair) -> str:
    gain = mapping(pair.get("gain"))
    last = mapping(gain.get("at_largest"))
    if not last:
        return "Unknown: the arms' laws share no range of compute."
    candidate, baseline = pair["candidate"], pair["baseline"]
    said = [
        f"Compute gain {_gain(pair, last)} at {_plain(last.get('compute'), 3)} FLOPs, the largest compute of both arms"
    ]
    if (value := number(last.get("gain"))) is not None:
        said.append(f"for the same loss {baseline} needs {fixed(value)} times the FLOPs of {candidate}")
    params = mapping(gain.get("params"))
    if params:
        said.append(f"parameter gain {_gain(pair, params)} at {si(params.get('params'))} parameters")
    reach = number(last.get("reach")) or 1.0
    if reach > INSIDE:
        said.append(f"a law is extrapolated {reach:.2g} times beyond its runs there")
    return f"{'; '.join(said)}."


def _gain(pair: Pair, point: dict[str, Any]) -> str:
    value = number(point.get("gain"))
    if value is None:
        return "undefined (the baseline's law does not reach that loss)"
    return estimate(value, point.get("lo"), point.get("hi"), "#.3g", _level(pair))


def _certainty(study: Study, pair: Pair, cells: list[Cell]) -> str:
    arms = (pair["candidate"], pair["baseline"])
    counts = [len(study.of(arm, cell)) for arm in arms for cell in cells]
    sizes, dof = len({cell.size for cell in cells}), [number(study.fit(arm, "flops").get("dof")) for arm in arms]
    design = [f"{_range(counts, 'seed')} per arm and size", plural(sizes, "size"), plural(sum(counts), "run")]
    if known := [d for d in dof if d is not None]:
        design.append(f"{plural(min(known), 'degree')} of freedom per law")
    said = "No difference" if pair["verdict"] == "no difference" else pair["verdict"]
    return " ".join([f"{said}: {pair['reason'].rstrip('.')}.", f"{', '.join(design)}.", *_power(pair)])


def _power(pair: Pair) -> list[str]:
    """What difference the runs can detect, and how many of them would settle one as large as the one observed."""
    power = mapping(pair.get("power"))
    if not power:
        return []
    target, said = f"{100 * (number(power.get('target')) or 0.8):.0f}% power", []
    if (least := number(power.get("detectable"))) is not None:
        said.append(f"With {target} these runs detect a gain of {least:.3g} or more.")
    need, best = number(power.get("cells_needed")), mapping(power.get("best"))
    if need is None:
        ways = ["more than 1,000 matched sizes and budgets"]
    else:
        ways = [f"{need:.0f} matched sizes and budgets (have {_plain(power.get('cells'))})"]
    if best:
        seeds, have = _plain(best.get("need")), _plain(best.get("have"))
        ways.append(f"{seeds} seeds per arm at N = {si(best.get('params'))} (have {have})")
    return [*said, f"To detect a gain as large as the one observed: {' or '.join(ways)}."]


def _regime(study: Study, pair: Pair) -> str:
    """Sizes, tokens per parameter, context and corpus of the pair's finished runs."""
    runs = [run for run in study.done if run.arm in (pair["candidate"], pair["baseline"])]
    configs = [run.record.config for run in runs]
    found: dict[str, list[Any]] = {
        "sizes": list(dict.fromkeys(cell.size for cell in study.cells if any(run.cell == cell for run in runs))),
        "tokens_per_parameter": [run.tokens / run.params for run in runs if run.tokens and run.params],
        "context": [mapping(config.get("train")).get("seq_len") for config in configs],
        "corpus": [mapping(config.get("data")).get("source") for config in configs],
    }
    said = [f"{', '.join(map(str, found['sizes']))} non-embedding parameters"]
    if ratios := [float(f"{v:.2g}") for v in map(number, found["tokens_per_parameter"]) if v is not None]:
        said.append(f"{_range(ratios, 'token')} per parameter")
    for key, words in (("context", "context of {} tokens"), ("corpus", "corpus {}")):
        values = dict.fromkeys(_plain(value) for value in found[key] if value is not None)
        said.append(words.format(", ".join(values)) if values else f"{key} not recorded")
    return f"{'; '.join(said)}."


def _settings(study: Study, arms: Iterable[str]) -> str:
    """Positions and convolutions of the arms, the baseline first."""
    return " ".join(f"{arm}: {' or '.join(_positions(study, arm)) or 'not recorded'}." for arm in reversed([*arms]))


def _positions(study: Study, arm: str) -> list[str]:
    models = (run.record.model for run in study.done if run.arm == arm)
    return list(dict.fromkeys(positions(model) for model in models if model))


def positions(model: dict[str, Any]) -> str:
    """Positions and short convolutions of an arm's layers in words, from a run record's `model`."""
    kind = model.get("position")
    words = {"none": "no position embedding (NoPE)", "learned": "learned position embedding"}.get(str(kind), str(kind))
    if kind == "rope":
        words = f"RoPE base {_power_of_ten(model.get('rope_theta'))}"
        fraction, every = number(model.get("rope_fraction")), number(model.get("nope_interval"))
        if fraction is not None and fraction < 1:
            words += f" on {100 * fraction:.3g}% of each head"
        if every:
            words += f", NoPE in every {every:.0f}th attention layer"
    words += _convolution(model, "attention_conv")
    kinds = dict.fromkeys(listed(model.get("layer_types")))
    recurrent = [spec for spec in map(mixer, names()) if spec.name in kinds and not spec.attends]
    for label in dict.fromkeys(spec.label for spec in recurrent if "conv_size" in spec.fields):
        words += f"; {label} layers{_convolution(model, 'conv').replace(',', ' with', 1)}"
    return words


def _convolution(model: dict[str, Any], field: str) -> str:
    taps = number(model.get(f"{field}_size"))
    if not taps:
        return "" if taps is None else ", no short convolution"
    return f", short convolution on the {model.get(field, 'input')} ({taps:.0f} taps)"


def _copied(study: Study, measured: list[Copying], cell: Cell) -> str:
    if not any(c.measured for c in measured):
        return f"{NOT_RECORDED} These runs have no induction score, so this condition of a headline is not checked."
    state = set_in(measured)
    yes = "Not known in every run" if state is None else "Yes" if state else "No"
    said = ", ".join(f"{c.arm} {in_words(c)}" for c in reversed(measured))
    return (
        f"{yes}. Gain on a repeated random segment at {study.label(cell)}, nats per token: {said}. "
        f"Copying has set in where every seed gains {INDUCTION_ONSET:g} or more."
    )


def _power_of_ten(value: Any) -> str:
    """1e6 for 1,000,000; other bases as they are."""
    n = number(value)
    if n is None or n <= 0:
        return "unknown"
    mantissa, exponent = f"{n:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _plain(value: Any, significant: int = 6) -> str:
    """A number without trailing zeros, anything else as it is."""
    n = number(value)
    return str(value) if n is None else f"{n:.{significant}g}".replace("e+", "e")


def _level(pair: Pair) -> float:
    return number(pair.get("level")) or 0.95


def _range(values: Iterable[float], noun: str) -> str:
    """3 seeds; 1 to 3 seeds."""
    low, high = min(values := list(values)), max(values)
    return f"{low:g}{f' to {high:g}' if high > low else ''} {noun}{'' if high == 1 else 's'}"
