"""Muon beside torch's, and its orthogonalisation against a singular value decomposition."""

import pytest
import torch

from qies.train.optim import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_is_torch_s_bit_for_bit(shape):
    params = [torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    options = {"lr": 0.04, "weight_decay": 0.01, "momentum": 0.95}
    optimizers = [kind([p], **options) for kind, p in zip((Muon, torch.optim.Muon), params, strict=True)]
    draw = torch.Generator().manual_seed(2)
    for _ in range(20):
        grad = torch.randn(*shape, generator=draw)
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_singular_vectors_stay_and_singular_values_go_near_one(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    out = orthogonal(matrix, torch.float32)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ out @ vh.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-5)
    assert (inner.diagonal() > 0.6).all() and (inner.diagonal() < 1.3).all()
