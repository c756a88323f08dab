"""The verb bench decodings: what each decoding costs beside greedy decoding."""

from __future__ import annotations

from pathlib import Path

from qies.cli.options import check_outputs, provenance, require_at_least
from qies.errors import UserError
from qies.storage import write_json
from qies.terminal import show


def decodings(
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    model: Path | None = None,
    prompt: str = "The people of the United States",
    new_tokens: int = 64,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Time greedy, sampled, entangled and speculative decoding of one model, as ratios to greedy.

    For example:

        qies bench decodings --cases 400k:512 --rounds 3
        qies bench decodings --model runs/first --new-tokens 128

    Args:
        rounds: Timed rounds, after one warm-up round.
        threads: CPU threads.
        cases: SIZE:T, a size of the arm qies and the tokens of the prompt; by default a few. Weights are initial ones,
            with which every draft is accepted: the best case.
        model: A trained model instead.
        prompt: The text that it continues.
        new_tokens: Tokens to decode.
        out: Also write the JSON to this file.
        json: Print JSON.
    """
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from qies.bench.decodings import bench_decodings, bench_sizes
    from qies.decoding import encode, load_model

    require_at_least(1, rounds=rounds, threads=threads, new_tokens=new_tokens)
    if model is not None and cases:
        raise UserError("--cases are sizes of untrained models; omit them with --model.")
    check_outputs(out=out)
    torch.set_num_threads(threads)
    if model is None:
        results = bench_sizes(cases, new_tokens, rounds)
    else:
        trained, tokenizer = load_model(model)
        ids = encode(tokenizer, prompt)
        results = [bench_decodings(trained, f"T={ids.shape[1]}, {new_tokens} new tokens", ids, new_tokens, rounds)]
    value = provenance("decodings") | {"threads": threads, "cases": results}
    if out is not None:
        write_json(out, value)

    def text() -> None:
        table = Table("case", "decoding", "ms", "times greedy", title="bench decodings", box=box.SIMPLE_HEAD)
        for result in results:
            for i, name in enumerate(result["seconds"]):
                row = f"{1e3 * result['seconds'][name]:.1f}", f"{result['ratio'][name]:.2f}"
                table.add_row("" if i else result["case"], name, *row)
        Console().print(table)
        for result in results:
            for kind, counts in result["acceptance"].items():
                rate = f"{counts['accepted']} of {counts['drafted']} drafted tokens accepted"
                print(f"{result['case']}: draft without {kind}: {rate}")

    show(json, value, text)
