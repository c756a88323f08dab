"""The entanglement op inside a plain PyTorch model, in ten lines: it learns to recall the latest value of a key.

Run: python examples/plain_pytorch.py
"""

import torch
from torch import nn

from qies import entangle


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.into, self.out = heads, nn.Linear(width, 3 * width + 2 * heads), nn.Linear(width, width)

    def forward(self, x):  # [B, T, D] -> [B, T, D]
        q, k, v, rest = self.into(x).split([x.shape[-1]] * 3 + [2 * self.heads], -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))  # keys are complex: [Re | Im]
        beta, decay = torch.sigmoid(rest).chunk(2, -1)
        o, _state = entangle(q, k, v, beta, torch.log(0.9 + 0.1 * decay), theta=None)
        return x + self.out(o.flatten(2))


def main(steps: int = 300) -> float:
    """Recall: 64 (key, value) pairs of which keys repeat with new values, then a key; returns how often the model names
    that key's latest value in the last batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keys_in, values_in = nn.Embedding(16, 32), nn.Embedding(17, 32)  # value 16: nothing, this is the question
    model = nn.Sequential(Layer(32, 2), nn.Linear(32, 16))
    optimizer = torch.optim.AdamW([*keys_in.parameters(), *values_in.parameters(), *model.parameters()], lr=1e-2)
    accuracy = 0.0
    for step in range(steps):
        keys, values = torch.randint(16, (64, 65)), torch.randint(16, (64, 65))
        earlier = (keys[:, :-1] == keys[:, -1:]) * torch.arange(1, 65)
        answer = values.gather(1, earlier.argmax(1, keepdim=True)).squeeze(1)
        values[:, -1] = 16
        logits = model(keys_in(keys) + values_in(values))[:, -1]
        loss = nn.functional.cross_entropy(logits, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (logits.argmax(-1) == answer).float().mean().item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, accuracy {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
