"""The mapping onto flash-linear-attention, with the package's own slow references in the place of its CUDA kernels.

The references, and therefore these comparisons, compute in float32. Without the package they are skipped; what the op
says when something is missing is tested everywhere.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from entangle_cases import assert_close, entangle_chunk, entangle_naive, evaluate, inputs

from qies.errors import UserError
from qies.ops.entangle import Inputs, entangle, fla
from qies.ops.pairs import times_i, unit


def reference(op):
    """`naive_recurrent_<op>` of the package, from its file: its own `__init__` wants Triton, which is for GPUs."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        pytest.skip("the referees are in the package flash-linear-attention: pip install 'qies[test]'")
    path = Path(package.origin).parent / "ops" / op / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"naive_recurrent_{op}")


def mapped(*six, state, mode):
    """The op as `entangle_fla` computes it, on the references."""
    call = fla.mapping(Inputs(*six, state), mode)
    return fla.results(call, *reference(call.kernel)(**call.arguments))


@pytest.mark.parametrize("T", [1, 31, 64, 65])
@pytest.mark.parametrize("phase,state", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("mode", ["real", "complex"])
def test_the_mapping_is_the_recurrence(T, phase, state, channels, mode):
    args = inputs(2, T, 2, 3, 4, mode=mode, channels=channels, phase=phase, state=state, seed=T)
    # one token turns nothing when there is no state: its dtheta is the rounding of what cancels
    floor = 1 if T == 1 else 0.1
    assert_close(evaluate(mapped, args, mode, torch.float32), evaluate(entangle_naive, args, mode), 1e-5, floor)


EDGES = {
    "parallel reflections": lambda a: (a[1].copy_(a[1][:, :1].expand_as(a[1]).clone()), a[3].fill_(2), a[4].zero_()),
    "some tokens damp to nothing": lambda a: a[4][:, ::7].fill_(-50),
    "zero-length keys and queries": lambda a: (a[1][:, ::3].zero_(), a[0][:, 1::3].zero_()),
    "thousands of radians": lambda a: a[5].mul_(3000),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode,channels", [("real", False), ("complex", True)])
def test_edges(edge, mode, channels):
    args = inputs(1, 40, 2, 4, 3, mode=mode, channels=channels, seed=5)
    EDGES[edge](args)
    args = [x.float().double() for x in args]
    got, expected = evaluate(mapped, args, mode, torch.float32), evaluate(entangle_naive, args, mode)
    if edge.startswith("zero-length"):  # the direction of nothing: its gradient is finite, and huge
        for name in ("dq", "dk"):
            got[name], expected[name] = got[name].clamp(-1e3, 1e3), expected[name].clamp(-1e3, 1e3)
    assert_close(got, expected, 1e-5)


def test_a_continuation_starts_in_the_physical_gauge():
    *six, state = [x.float() for x in inputs(1, 40, 2)]
    whole, final = mapped(*six, state=state, mode="real")
    first, middle = mapped(*(x[:, :17] for x in six), state=state, mode="real")
    second, end = mapped(*(x[:, 17:] for x in six), state=middle, mode="real")
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, final)


# Judges that are not ours: the package's references, called without our mapping and without phase


def gated_delta_rule(q, k, v, beta, log_alpha, theta, *, state, mode):
    return reference("gated_delta_rule")(
        unit(q), unit(k), v, beta, log_alpha, scale=1.0, initial_state=state, output_final_state=True
    )


def kda(q, k, v, beta, log_alpha, theta, *, state, mode):
    g = torch.cat([log_alpha, log_alpha], -1)
    return reference("kda")(unit(q), unit(k), v, g, beta, scale=1.0, initial_state=state, output_final_state=True)


def gated_delta_product(q, k, v, beta, log_alpha, theta, *, state, mode):
    """Two Householder steps a token, along k and Jk; the second call reads the same state along Jq."""

    def read(q):
        keys, values = (torch.stack(x, 2).flatten(1, 2) for x in ((k, times_i(k)), v.chunk(2, -1)))
        betas = beta.repeat_interleave(2, 1)
        return reference("gated_delta_product")(
            q, keys, values, log_alpha, betas, 1.0, initial_state=state, output_final_state=True, num_householder=2
        )

    q, k = unit(q), unit(k)
    (re, final), (im, _) = read(q), read(times_i(q))
    return torch.cat([re, im], -1), final


@pytest.mark.parametrize("T", [5, 64, 131])
@pytest.mark.parametrize(
    "judge,mode,channels",
    [(gated_delta_rule, "real", False), (kda, "real", True), (gated_delta_product, "complex", False)],
)
def test_the_op_agrees_with_the_references(judge, mode, channels, T):
    args = inputs(2, T, 2, 4, 5, mode=mode, channels=channels, phase=False, seed=T)
    theirs = evaluate(judge, args, mode, torch.float32)
    assert_close(evaluate(entangle_chunk, args, mode), theirs, 1e-5)
    assert_close(evaluate(entangle_naive, args, mode), theirs, 1e-5)


@pytest.mark.skipif(not (torch.cuda.is_available() and fla.installed()), reason="needs CUDA and flash-linear-attention")
@pytest.mark.parametrize("T", [1, 64, 131])
@pytest.mark.parametrize("mode,channels", [("real", False), ("real", True), ("complex", False), ("complex", True)])
def test_the_kernels_themselves(mode, channels, T):
    def run(*six, state, mode):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            o, final = entangle(*(x.cuda() for x in six), state=state.cuda(), mode=mode, backend="fla")
        return o.cpu(), final.cpu()

    args = inputs(2, T, 2, 16, 32, mode=mode, channels=channels, seed=T)
    assert_close(evaluate(run, args, mode, torch.float32), evaluate(entangle_naive, args, mode), 0.05)


# What runs on which kernel, and what is said of the rest


@pytest.fixture
def anywhere(monkeypatch):
    """A machine that lacks nothing, whose kernels are stand-ins that note what they are given."""
    calls = []

    def kernel(name):
        def run(q, k, v, beta, g, scale, initial_state, output_final_state):
            calls.append((name, q, v, beta, g, initial_state))
            B, _, H, K = q.shape
            return torch.zeros_like(v), torch.zeros(B, H, K, v.shape[-1])

        return run

    monkeypatch.setattr(fla, "missing", lambda device: None)
    monkeypatch.setattr(fla, "kernel", kernel)
    return calls


@pytest.mark.parametrize("backend", ["fla", "auto"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode,channels", [("real", False), ("real", True), ("complex", False), ("complex", True)])
def test_kernels_get_half_precision_and_float32_controls(anywhere, backend, autocast, mode, channels):
    *six, state = [x.float() for x in inputs(2, 8, 2, mode=mode, channels=channels)]
    if not autocast:
        six[:3] = (x.bfloat16() for x in six[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        o, final = entangle(*six, state=state, mode=mode, backend=backend)
    ((name, q, v, beta, g, initial),) = anywhere
    assert name == ("kda" if channels else "gated_delta_rule")
    assert q.dtype == v.dtype == torch.bfloat16 and beta.dtype == g.dtype == initial.dtype == torch.float32
    assert q.shape == (2, 16 if mode == "complex" else 8, 2, 6) and v.shape == (*q.shape[:3], 4)
    assert g.shape == (q.shape if channels else beta.shape) and beta.shape == q.shape[:3]
    assert o.shape == six[2].shape and o.dtype == six[2].dtype and final.dtype == torch.float32


INEXPRESSIBLE = [
    ({"mode": "complex", "disc": True}, torch.bfloat16, "complex beta"),
    ({"m": 129}, torch.bfloat16, "up to 2m = 256"),
    ({}, torch.float32, "not float32"),
    ({}, torch.float64, "not float64"),
]


@pytest.mark.parametrize("case,dtype,message", INEXPRESSIBLE)
def test_what_no_kernel_expresses_is_one_line_and_left_to_others(anywhere, case, dtype, message):
    *six, state = [x.to(dtype) for x in inputs(**case)]
    mode = case.get("mode", "real")
    with pytest.raises(UserError, match=message) as error:
        entangle(*six, state=state, mode=mode, backend="fla")
    assert "\n" not in str(error.value) and "backend='chunk'" in str(error.value)
    o, _ = entangle(*six, state=state, mode=mode)
    assert not anywhere
    torch.testing.assert_close(o, entangle(*six, state=state, mode=mode, backend="chunk")[0])


def test_one_token_is_a_step(anywhere):
    *six, state = [x.bfloat16() for x in inputs(T=1)]
    entangle(*six, state=state)
    assert not anywhere
    entangle(*six, state=state, backend="fla")
    assert len(anywhere) == 1


def test_what_the_machine_lacks_is_one_line(monkeypatch):
    *six, state = [x.bfloat16() for x in inputs()]
    with pytest.raises(UserError, match=r"needs a CUDA device .*cpu") as error:
        entangle(*six, state=state, backend="fla")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(fla, "installed", lambda: True)
    assert fla.missing(torch.device("cuda")) is None
    monkeypatch.setattr(fla, "installed", lambda: False)
    assert "flash-linear-attention" in fla.missing(torch.device("cuda"))
    torch.testing.assert_close(entangle(*six, state=state)[0], entangle(*six, state=state, backend="chunk")[0])


def test_a_package_is_installed_only_with_its_triton(monkeypatch):
    for absent in ("fla", "triton", None):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, absent=absent: None if name == absent else name)
        fla.installed.cache_clear()
        assert fla.installed() == (absent is None)
    fla.installed.cache_clear()


def test_a_broken_package_is_one_line(monkeypatch):
    def broken(name):
        raise ImportError("no such symbol")

    monkeypatch.setattr(fla.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"no usable chunk_kda \(no such symbol\)"):
        fla.kernel("kda")


def test_kernels_are_looked_up_by_name(monkeypatch):
    class Module:
        chunk_gated_delta_rule = chunk_kda = staticmethod(len)

    monkeypatch.setattr(fla.importlib, "import_module", {f"fla.ops.{name}": Module for name in fla.KERNELS}.get)
    assert all(fla.kernel(name) is len for name in fla.KERNELS)
