"""Hook points: where a value inside an entanglement layer can be read or replaced by an ordinary forward hook.

The names follow TransformerLens' for gated delta networks, prefixed by the path of the layer and of its group of heads:
`model.layers.0.mixer.heads.0.hook_beta`. docs/interventions.md lists them with their shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qies.ops.entangle import Inputs, evolve
from qies.ops.entangle.layout import no_autocast
from qies.ops.entangle.naive import empty_state, read, trajectory


class HookPoint(nn.Identity):
    """The identity, without parameters: `register_forward_hook` reads its value, or replaces it by what it returns.

    A point with nothing attached is not called. In a compiled model only hooks attached before compilation run.
    """

    @property
    def attached(self) -> bool:
        return bool(self._forward_hooks or self._forward_pre_hooks)


class HeadHooks(nn.Module):
    """The hook points of one group of heads, m complex key channels and V values each.

    hook_q, hook_k [B,T,H,2m], hook_v [B,T,H,V], hook_beta [B,T,H] or [B,T,H,2], hook_log_decay [B,T,H] or [B,T,H,m],
    hook_theta [B,T,H,m] (not called without phases): the op's inputs, before q and k are normalised.
    hook_initial_state, hook_final_state [B,H,2m,V]: the states before the first token and after the last; what they
    return is used, and kept in the cache. hook_ssm_state [B,T,H,2m,V]: the state after every token; what it returns is
    read out but not carried on. It makes the layer run as the plain recurrence, slowly and with all states in memory.
    hook_recurrence_out [B,T,H,V]: the read-out before norm, gate and projection. In complex mode the values are pairs
    [B,T,H,2V].
    """

    def __init__(self) -> None:
        super().__init__()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_beta, self.hook_log_decay, self.hook_theta = HookPoint(), HookPoint(), HookPoint()
        self.hook_initial_state, self.hook_final_state = HookPoint(), HookPoint()
        self.hook_ssm_state, self.hook_recurrence_out = HookPoint(), HookPoint()

    @property
    def attached(self) -> bool:
        """Whether any of the points has a hook."""
        return any(p._forward_hooks or p._forward_pre_hooks for p in self._modules.values())  # type: ignore[union-attr]

    def evolve(self, x: Inputs, mode: str, texts: Tensor | None) -> tuple[Tensor, Tensor]:
        """`qies.ops.entangle.evolve` with every point on the way."""
        points = (self.hook_q, self.hook_k, self.hook_v, self.hook_beta, self.hook_log_decay, self.hook_theta)
        x = Inputs(*(None if y is None else p(y) for p, y in zip(points, x[:6], strict=True)), x.state)  # type: ignore[arg-type,call-arg]
        if self.hook_initial_state.attached:
            before = empty_state(x, mode) if x.state is None else x.state
            x = x._replace(state=self.hook_initial_state(before))
        if self.hook_ssm_state.attached:
            with no_autocast(x.q):
                states = trajectory(x, mode, texts)
                o, state = read(x.q, self.hook_ssm_state(states), mode).to(x.v.dtype), states[:, -1]
        else:
            o, state = evolve(x, mode, texts=texts)
        return self.hook_recurrence_out(o), self.hook_final_state(state)


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """The hook points of a model or layer by their qualified names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HookPoint)}


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been applied to a model, or to it in place."""
    return isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None
