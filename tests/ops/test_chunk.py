"""Both chunk forms against the recurrence: outputs, final state and all seven gradients."""

import multiprocessing

import pytest
import torch
from entangle_cases import NAMES, assert_close, entangle_chunk, entangle_fused, entangle_naive, evaluate, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops import compiled
from qies.ops.entangle import chunk, cpu, entangle
from qies.ops.entangle.cpu import in_parts, scan, workspace

FORMS = [("real", False), ("complex", False), ("complex", True)]


@pytest.mark.parametrize("T", [1, 2, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
def test_chunk_is_the_recurrence(T, mode, disc, channels):
    B, H, phase, state = [(1, 1, True, True), (3, 1, False, True), (1, 3, True, False)][T % 3]
    args = inputs(B, T, H, 3, 4, mode=mode, disc=disc, channels=channels, phase=phase, state=state, seed=T)
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    for form in (entangle_chunk, entangle_fused):
        assert_close(evaluate(form, args, mode, torch.float32), expected, 1e-5)


@pytest.mark.parametrize(
    "mode,disc,channels", [("real", False, False), ("real", False, True), ("complex", True, False)]
)
def test_a_thousand_tokens(mode, disc, channels):
    args = inputs(1, 1000, 1, 4, 4, mode=mode, disc=disc, channels=channels)
    args[4] = args[4] / 10
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    for form in (entangle_chunk, entangle_fused):
        assert_close(evaluate(form, args, mode, torch.float32), expected, 1e-5)


EDGES = {
    "beta 0": lambda a: a[3].zero_(),
    "beta 1": lambda a: a[3].fill_(1),
    "beta 2": lambda a: a[3].fill_(2),
    "no damping": lambda a: a[4].zero_(),
    "hardly any damping": lambda a: a[4].fill_(-1e-4),
    "damped to nothing": lambda a: a[4].fill_(-50),
    "some tokens damp to nothing": lambda a: a[4][:, ::7].fill_(-50),
    "strong damping": lambda a: a[4].fill_(-3),
    "parallel keys": lambda a: a[1].copy_(a[1][:, :1].expand_as(a[1]).clone()),
    "parallel reflections": lambda a: (
        a[1].copy_(a[1][:, :1].expand_as(a[1]).clone()),
        a[3].fill_(2),
        a[4].zero_(),
        a[5].zero_(),
    ),
    "zero-length keys and queries": lambda a: (a[1][:, ::3].zero_(), a[0][:, 1::3].zero_()),
    "thousands of radians": lambda a: a[5].mul_(3000),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode,channels", [("real", False), ("complex", True)])
def test_edges(edge, mode, channels):
    args = inputs(2, 70, 2, 4, 3, mode=mode, channels=channels, seed=5)
    EDGES[edge](args)
    args = [x.float().double() for x in args]
    expected = evaluate(entangle_naive, args, mode)
    got = {"exact": evaluate(entangle_chunk, args, mode)}
    for form in (entangle_chunk, entangle_fused):
        got[form.__name__] = evaluate(form, args, mode, torch.float32)
    assert_close(got.pop("exact"), expected, 1e-10)
    # strong damping leaves little of what passes a token: sums that cancel, or with nothing left only their rounding
    tolerance, floor = {"strong damping": (3e-5, 0.1), "damped to nothing": (1e-5, 3)}.get(edge, (1e-5, 0.1))
    for single in got.values():
        assert_close(single, expected, tolerance, floor)


@pytest.mark.parametrize("T,seed", [(70, 0), (70, 1), (70, 2), (70, 3), (1000, 0)])
def test_long_rows_of_the_same_reflection(T, seed):
    """The same rounding in every token adds up, in the definition too: T equal products k . w = 2, each to its ulp."""
    args = inputs(1, T, 2, 32, 8, seed=seed)
    EDGES["parallel reflections"](args)
    args = [x.float().double() for x in args]
    expected = evaluate(entangle_naive, args, "real")
    for form in (entangle_chunk, entangle_fused):
        assert_close(evaluate(form, args, "real", torch.float32), expected, T * 2.0**-21)


@pytest.mark.parametrize("form", [entangle_chunk, entangle_fused])
def test_tokens_that_forget_everything(form):
    """alpha = 0: what came before is gone, whatever it was, and no gradient reaches it."""
    args = [x.float() for x in inputs(1, 70, 2, 4, 3)]
    args[4][:, ::9] = -torch.inf
    got = evaluate(form, args, "real")
    assert all(x.isfinite().all() for x in got.values())
    args[4][:, ::9] = -1e4
    want = evaluate(entangle_naive, args, "real")
    assert_close(got, want, 1e-5)
    assert (got["dstate"] == 0).all()


def test_strong_damping_makes_chunks_shorter_and_only_then():
    gentle = torch.full((1, 128, 1), -1.0)
    assert chunk.chunk_length(gentle, 32) == 32
    assert chunk.chunk_length(3 * gentle, 32) == 16
    reset = torch.full((1, 128, 1), -0.5)
    reset[:, 40] = -1e4  # a document that ends
    assert chunk.chunk_length(reset, 32) == 32
    assert chunk.chunk_length(torch.full((1, 128, 1), -50.0), 32) == 2


def test_the_digest_sees_every_file(tmp_path):
    (tmp_path / "folder").mkdir()
    seen = {compiled.digest(tmp_path)}
    for name in ("a.py", "folder/b.py"):
        for text in ("1", "2"):
            (tmp_path / name).write_text(text)
            seen.add(compiled.digest(tmp_path))
    assert len(seen) == 5


def test_two_processes_never_give_two_codes_one_name():
    function = scan.forward.py_func
    names = {compiled.kernel(function)._cache._cache_file._data_name(1) for _ in range(2)}
    assert len(names) == 2


def test_compiled_code_is_kept_until_any_file_of_the_kernel_changes(monkeypatch):
    key = scan.forward._cache._index_key
    signature = scan.forward.signatures[0] if scan.forward.signatures else ()
    codegen = scan.forward.targetctx.codegen()
    before = key(signature, codegen)
    assert key(signature, codegen) == before
    monkeypatch.setattr(type(scan.forward._cache), "sources", "another")
    assert key(signature, codegen) != before


def test_the_kernel_cuts_chunks_head_by_head():
    damping = torch.full((1, 70, 2), -0.5)
    damping[:, 40, 0] = damping[:, 50:, 1] = -100.0
    sizes = workspace.Sizes(70, 2, 4, 4, 1, 1, 1, False, 16, 16)
    first, starts, kept_at, kept = scan.plan(damping.numpy().reshape(-1), sizes, 1)
    assert first.tolist() == [0, 4, 4 + 23]
    assert starts.tolist()[:4] == [0, 32, 40, 70]
    assert starts.tolist()[4:] == [0, 32, *range(50, 71)]
    # sections of 32 tokens: [0, 32), [32, 40), [40, 70), the end; [0, 32), [32, 64), [64, 70), the end
    assert kept_at.tolist()[:4] == [0, 1, 2, 3]
    assert kept_at.tolist()[4:] == [4, 5, *range(-1, -15, -1), 6, *range(-1, -6, -1), 7]
    assert kept == 8


@pytest.mark.parametrize("mode,disc,channels", [("real", False, False), ("real", False, True), ("complex", True, True)])
def test_gradcheck(mode, disc, channels):
    args = [x.requires_grad_() for x in inputs(1, 5, 1, 2, 2, mode=mode, disc=disc, channels=channels)]
    assert torch.autograd.gradcheck(lambda *a: entangle_chunk(*a, mode), args, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*(st.integers(1, n) for n in (3, 100, 9, 5, 18))),
    st.sampled_from(FORMS),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.tuples(st.sampled_from([0, 1, 10, 70, 700]), st.sampled_from([0.02, 0.2, 0.7])),
    st.integers(0, 1000),
)
def test_any_shape_and_damping(shape, form, given_inputs, strong, seed):
    (mode, disc), (channels, phase, state), (most, share) = form, given_inputs, strong
    args = inputs(*shape, mode=mode, disc=disc, channels=channels, phase=phase, state=state, seed=seed)
    hit = torch.rand(args[4].shape, generator=torch.Generator().manual_seed(seed)) < share
    args[4][hit] *= most  # up to e^(-0.3 most) in one token
    args = [x if x is None else x.float().double() for x in args]
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    assert_close(evaluate(entangle_fused, args, mode, torch.float32), expected, 1e-5)


def test_the_plain_form_has_second_derivatives_and_the_kernel_refuses_them():
    args = [x.requires_grad_() for x in inputs(1, 5, 1, 2, 2)]
    assert torch.autograd.gradgradcheck(lambda *a: entangle_chunk(*a)[0].square().sum(), args, atol=1e-6)
    o, _ = entangle_fused(*(x.float() for x in args))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(o.sum(), args, create_graph=True)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads, monkeypatch):
    args = [x.float() for x in inputs(2, 40, 3, 3, 4)]
    alone = evaluate(entangle_fused, args, "real")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = evaluate(entangle_fused, args, "real")
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_what_a_part_raises_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        in_parts(lambda begin, end: 1 // begin, 4)


def test_a_forked_child_computes_too(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    args = [x.float() for x in inputs(2, 40, 3, 3, 4)]
    want, _ = entangle_fused(*args)
    with multiprocessing.get_context("fork").Pool(1) as children:
        got = children.apply_async(entangle_fused, args).get(timeout=60)[0]
    assert torch.equal(got, want)


def test_nan_is_never_taken_for_a_number():
    for i in (3, 4):  # beta, log_alpha
        args = [x.float() for x in inputs(1, 40, 1, 3, 4)]
        args[i][0, 0] = torch.nan
        o, state = entangle_fused(*args)
        assert o[0, 1:].isnan().all() and state.isnan().all()


def test_a_sequence_of_nan_does_not_reach_its_neighbours():
    args = [x.float() for x in inputs(3, 40, 2, 3, 4)]
    clean = evaluate(entangle_fused, args, "real")
    args[2][1, 20] = torch.nan
    o, state = entangle_fused(*args)
    assert o[1, 21:].isnan().all() and state[1].isnan().all()
    assert torch.equal(o[::2].double(), clean["o"][::2]) and torch.equal(state[::2].double(), clean["state"][::2])


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_within_its_rounding(autocast):
    args = inputs(8, 70, 2, 8, 16, seed=3)
    args = [x.bfloat16().double() for x in args]
    expected = evaluate(entangle_naive, args, "real")
    half = [x if name in ("log_alpha", "theta", "state") else x.bfloat16() for name, x in zip(NAMES, args, strict=True)]
    half = [x.float() if autocast or x.dtype == torch.float64 else x for x in half]

    def run(*tensors, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return entangle(*tensors, **options)

    got = evaluate(run, half, "real")
    assert_close(got, expected, 0.02)
    o, state = run(*half[:6], state=half[6])
    assert o.dtype == half[2].dtype and state.dtype == torch.float32


def test_the_backward_keeps_no_state_per_token():
    B, T, H, m, V = 1, 256, 1, 16, 32
    args = [x.float().requires_grad_() for x in inputs(B, T, H, m, V)]
    o, _ = entangle_fused(*args)
    kept = sum(x.numel() for x in o.grad_fn.saved_tensors if x is not None)
    assert kept < 0.2 * B * T * H * 2 * m * V
    with torch.no_grad():
        assert torch.equal(entangle_fused(*args)[0], o)


@pytest.mark.parametrize("damping", [-50.0, -20.0])
def test_not_even_where_every_token_damps_to_nothing(damping):
    B, T, H, m, V = 2, 256, 3, 8, 16
    args = inputs(B, T, H, m, V)
    args[4][:, :, 1:] = damping  # the first head stays as it is
    expected = evaluate(entangle_chunk, args, "real")
    got = evaluate(entangle_fused, args, "real", torch.float32)
    for results in (got, expected):
        results.pop("dlog_alpha")  # nothing but rounding where nothing passes
    assert_close(got, expected, 1e-5)
    o, _ = entangle_fused(*[x.float().requires_grad_() for x in args])
    kept = max(x.numel() for x in o.grad_fn.saved_tensors if x is not None)
    assert kept <= B * H * (T // 17 + 1) * 2 * m * V


def test_an_empty_batch():
    args = [x.float().requires_grad_() for x in inputs(0, 5, 2, 3, 4)]
    for form in (entangle_chunk, entangle_fused):
        o, state = form(*args)
        assert o.shape == (0, 5, 2, 4) and state.shape == (0, 2, 6, 4)
        (o.sum() + state.sum()).backward()
        assert args[0].grad.shape == (0, 5, 2, 6)


def test_views_that_negate():
    args = [x.float() for x in inputs(2, 33, 2, 3, 4)]
    q = torch.complex(torch.zeros_like(args[0]), -args[0]).conj().imag
    assert q.is_neg()
    torch.testing.assert_close(entangle_fused(q, *args[1:]), entangle_fused(*args))


def test_function_transforms_take_the_form_that_has_them():
    *args, S = (x.float() for x in inputs(2, 40, 2, 3, 4))

    def loss(v):
        return entangle(*args[:2], v, *args[3:], state=S)[0].square().sum()

    v = args[2].clone().requires_grad_()
    loss(v).backward()
    torch.testing.assert_close(torch.func.grad(loss)(args[2]), v.grad, atol=1e-4, rtol=1e-4)


def test_vmap_and_exports_do_not_read_the_numbers():
    *args, S = (x.float() for x in inputs(3, 40, 2, 3, 4))
    want, last = entangle(*args, state=S)
    assert S.abs().sum() > 0

    def one(state, *rest):
        o, state = entangle(*(x[None] for x in rest), state=state[None])
        return o[0], state[0]

    for got, expected in zip(torch.func.vmap(one)(S, *args), (want, last), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    class Layer(torch.nn.Module):
        def forward(self, *x):
            return entangle(*x[:6], state=x[6])

    exported = torch.export.export(Layer(), (*args, S), strict=False).module()
    for got, expected in zip(exported(*args, S), (want, last), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    o, last = entangle(*(x.to("meta") for x in args), state=S.to("meta"))
    assert o.shape == want.shape and last.shape == S.shape


def test_a_compiled_model_runs_the_kernel(monkeypatch):
    args = [x.float() for x in inputs(2, 40, 2, 3, 4)]
    calls = []
    monkeypatch.setattr(cpu._Fused, "apply", lambda *a, f=cpu._Fused.apply: calls.append(1) or f(*a))

    def twice(q, *rest):
        return 2 * entangle(q * 2, *rest)[0]

    want = evaluate(lambda *a, state, mode: (twice(*a), state), args, "real")
    compiled_twice = torch.compile(twice, backend="eager")
    got = evaluate(lambda *a, state, mode: (compiled_twice(*a), state), args, "real")
    assert len(calls) == 2 and all(torch.equal(got[name], want[name]) for name in want)
