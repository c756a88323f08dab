"""`qies bench prefill` and `decode`: arms of equal size beside each other, in one process, in float32.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qies import presets
from qies.accounting.cache import cache_bytes
from qies.accounting.flops import decode_flops_per_token, prefill_flops
from qies.accounting.parameters import longest_context
from qies.bench.cases import Case
from qies.bench.timing import Comparison, compare
from qies.errors import UserError
from qies.mixers.common import FULL
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.train.loop import keep_memory

ARMS = ("qies", "no_phase", "transformer")
CASES = {
    "prefill": ("400k:2048", "400k:16384", "100k:32768"),
    "decode": ("400k:1024", "400k:32768", "400k:131072", "400k:8x1024", "400k:8x32768", "6m:32768"),
}
PROMPT = 8  # tokens of the real prefill that a synthetic cache starts from
WARMUP = 2  # rounds of decoding that do not count
MEMORY = Path("/proc/meminfo")


def bench_inference(
    what: str,
    cases: Sequence[str] = (),
    arms: Sequence[str] = ARMS,
    *,
    rounds: int,
    vocab_size: int = 4096,
    clock: str = "wall",
) -> list[Comparison]:
    """The bench `prefill` or `decode` on cases written SIZE:T or SIZE:BxT; the first arm is the subject.

    Prefill: B prompts of T tokens into an empty cache, with the logits of the last token. Decode: one further token
    of each of B sequences, `rounds` times, on a cache that holds T tokens when the first is timed.

    Raises UserError, before any work, for a case or arm that is unknown, T beyond an arm's learned positions, and
    caches that do not fit in the free memory together.
    """
    parsed = [Case.parse(case) for case in cases or CASES[what]]
    if not arms:
        raise UserError("--arms names no arm; name at least one, such as qies transformer.")
    for arm in arms:
        if arms.count(arm) > 1:
            raise UserError(f"--arms names '{arm}' twice; name each arm once.")
    settings = [{arm: presets.settings(arm, case.size, vocab_size) for arm in arms} for case in parsed]
    for case, values in zip(parsed, settings, strict=True):
        _check(case, values, case.context + (rounds + WARMUP if what == "decode" else 0))
    keep_memory()
    run = _prefill if what == "prefill" else _decode
    with torch.no_grad():
        return [run(case, values, rounds, clock) for case, values in zip(parsed, settings, strict=True)]


def filled_cache(model: QiesForCausalLM, batch: int, context: int) -> QiesCache:
    """A cache of `context` tokens: a real prefill of the first few, and random keys and values for the others.

    What one more token costs does not depend on the numbers; the shapes, dtypes and places are those of a real prefill.
    """
    cache, few = QiesCache(model.config), min(PROMPT, context)
    model(torch.zeros(batch, few, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and context > few:
            heads, width = layer.keys.shape[1], layer.keys.shape[3]
            layer.update(*torch.randn(2, batch, heads, context - few, width, dtype=layer.keys.dtype))
    cache.seen_tokens = context
    return cache


def _prefill(case: Case, settings: dict[str, dict[str, Any]], rounds: int, clock: str) -> Comparison:
    ids = torch.randint(0, next(iter(settings.values()))["vocab_size"], (case.batch, case.context))
    calls: dict[str, Callable[[], None]] = {}
    caches: dict[str, QiesCache] = {}
    for arm, values in settings.items():
        model = _model(values)
        model(ids[:, :256], use_cache=True, logits_to_keep=1)  # kernels are compiled

        def call(arm: str = arm, model: QiesForCausalLM = model) -> None:
            caches[arm] = QiesCache(model.config)
            model(ids, past_key_values=caches[arm], logits_to_keep=1)

        calls[arm] = call
    facts = _facts(case, tokens=ids.numel())
    result = compare(str(case), calls, rounds=rounds, warmup=0, facts=facts, clock=clock)
    for arm, values in settings.items():
        flops = case.batch * sum(prefill_flops(values, case.context).values())
        result.costs[arm] = _costs(case, values, flops, caches[arm].state_bytes())
    return result


def _decode(case: Case, settings: dict[str, dict[str, Any]], rounds: int, clock: str) -> Comparison:
    ids = torch.zeros(case.batch, 1, dtype=torch.long)
    calls: dict[str, Callable[[], Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for arm, values in settings.items():
        model = _model(values)
        cache = filled_cache(model, case.batch, case.context)
        flops = case.batch * decode_flops_per_token(values, case.context)
        costs[arm] = _costs(case, values, flops, cache.state_bytes())
        calls[arm] = partial(model, ids, past_key_values=cache, logits_to_keep=1)
    facts = _facts(case, tokens=case.batch)
    return compare(str(case), calls, rounds=rounds, warmup=WARMUP, facts=facts, costs=costs, clock=clock)


def _model(values: dict[str, Any]) -> QiesForCausalLM:
    torch.manual_seed(0)
    return QiesForCausalLM(QiesConfig(**values)).eval()


def _facts(case: Case, tokens: int) -> dict[str, Any]:
    return {"size": case.size, "batch": case.batch, "context": case.context, "tokens": tokens, "dtype": "float32"}


def _costs(case: Case, values: dict[str, Any], flops: float, held: int) -> dict[str, Any]:
    """FLOPs of a call as counted, and the cache's bytes as measured and as counted."""
    counted = case.batch * sum(cache_bytes(values, case.context, itemsize=FULL).values())
    return {"flops": flops, "cache_bytes": held, "cache_bytes_counted": counted}


def _check(case: Case, settings: dict[str, dict[str, Any]], longest: int) -> None:
    """Raise UserError where an arm cannot have `longest` tokens, or the memory not the caches of all arms."""
    for arm, values in settings.items():
        if longest > longest_context(values):
            raise UserError(
                f"Case '{case}' takes {longest} tokens, beyond the {longest_context(values)} positions that arm {arm} "
                "learns; shorten it or leave the arm out of --arms."
            )
    needed = case.batch * sum(sum(cache_bytes(values, longest, itemsize=FULL).values()) for values in settings.values())
    free = _free_memory()
    if free is not None and 1.25 * needed > free:  # a cache has room for an eighth more; the rest for all others
        raise UserError(
            f"Case '{case}' needs {1.25 * needed / 2**30:,.1f} GiB for the caches of {len(settings)} arms, and "
            f"{free / 2**30:,.1f} GiB are free; lower the batch or the context, or name fewer --arms."
        )


def _free_memory() -> int | None:
    """Bytes, or None where the system does not say."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    return 1024 * int(found[1]) if found else None
