"""The models token by token, one document, no packing: written from the equations alone.

Titans (arXiv 2501.00663), equations 8-15 for the memory, 21-25 for MAC, in the causal reading:
token i sees the memory token h_j once the last query pooled into it is past, and is gated by the
memory's weights after its own write; 26-28 for MAG and 29-31 for MAL, where the memory runs over
persistent tokens and document as one sequence. Only the memory's update is taken from the oracle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState

P = dict[str, Tensor]


def reference_logits(config: ModelConfig, p: P, tokens: list[int]) -> Tensor:
    """[T, V] of one document from its first token on."""
    x = [p["embedding.weight"][t] for t in tokens]
    for i in range(config.blocks):
        mine = {n.removeprefix(f"blocks.{i}."): w for n, w in p.items()}
        inputs = [rms(u, mine["mixer_norm.weight"], config) for u in x]
        mixed = MIXERS[config.variant](
            config, {n.removeprefix("mixer."): w for n, w in mine.items()}, inputs
        )
        x = [u + m for u, m in zip(x, mixed, strict=True)]
        for t, u in enumerate(x):
            h = rms(u, mine["mlp_norm.weight"], config)
            gate, up = mine["mlp.gate.weight"] @ h, mine["mlp.up.weight"] @ h
            x[t] = u + mine["mlp.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    head = p["embedding.weight"] if config.tied_embeddings else p["head.weight"]
    return torch.stack([head @ rms(u, p["final_norm.weight"], config) for u in x])


def rms(x: Tensor, gain: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain


def turned(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """x [H, d]: pairs (i, i + d/2) as complex numbers, turned by position * base^(-2i/d)."""
    d = x.shape[-1]
    z = torch.complex(x[:, : d // 2], x[:, d // 2 :])
    angle = position * config.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Each [H, d]."""
    scores = torch.stack([(query * k).sum(-1) for k in keys]) / math.sqrt(query.shape[-1])
    return (torch.softmax(scores, 0)[..., None] * torch.stack(values)).sum(0)


def shared(config: ModelConfig, x: Tensor) -> Tensor:
    """Keys or values [K * d] -> [H, d]: query head h has those of head h // (H / K)."""
    kv_heads = config.kv_heads or config.heads
    x = x.view(kv_heads, -1)
    return torch.stack([x[h * kv_heads // config.heads] for h in range(config.heads)])


def attention(config: ModelConfig, p: P, x: list[Tensor]) -> list[Tensor]:
    return [p["attention.o.weight"] @ y.flatten() for y in windowed(config, p, x, [])]


def windowed(config: ModelConfig, p: P, x: list[Tensor], prefix: list[Tensor]) -> list[Tensor]:
    """What each token of x reads [H, d], before any output projection."""
    H, keys, values, out = config.heads, [], [], []
    always = [[shared(config, p[f"attention.{n}.weight"] @ u) for u in prefix] for n in "kv"]
    for t, u in enumerate(x):
        q = (p["attention.q.weight"] @ u).view(H, -1)
        k, v = (shared(config, p[f"attention.{n}.weight"] @ u) for n in "kv")
        keys.append(turned(k, t, config))
        values.append(v)
        first = 0 if config.window is None else max(0, t - config.window + 1)
        seen = [a + b[first:] for a, b in zip(always, (keys, values), strict=True)]
        out.append(softmax_read(turned(q, t, config), *seen))
    return out


class Stream:
    """A projection and its convolution, fed token by token."""

    def __init__(self, p: P, name: str, heads: int, unit: bool) -> None:
        self.weight, self.taps = p[f"memory.{name}.weight"], p[f"memory.{name}_conv.weight"]
        self.heads, self.unit, self.seen = heads, unit, []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(self.weight @ x)
        y = sum(self.taps[:, j] * row for j, row in enumerate(reversed(self.seen[-4:])))
        y = (y * torch.sigmoid(y)).view(self.heads, -1)
        return y / y.norm(dim=-1, keepdim=True).clamp(min=1e-6) if self.unit else y


class Memory:
    def __init__(self, config: ModelConfig, p: P) -> None:
        c = config.memory
        self.config, self.p, self.t = config, p, 0
        self.spec = MemorySpec(
            c.depth, c.expansion, c.activation, c.residual_norm, c.chunk, c.decay_to, c.read
        )
        self.q, self.k = (Stream(p, n, config.heads, True) for n in "qk")
        self.v = Stream(p, "v", config.heads, False)
        self.initial = tuple(p[f"memory.initial.{n}"] for n in range(c.depth))
        self.norm = None
        if c.residual_norm:
            self.norm = (p["memory.inner_gain"], p["memory.inner_bias"])
        self.state: MemoryState | None = None

    def after_persistent(self, x: list[Tensor]) -> list[Tensor]:
        """Writes x and reads there. What follows goes on from there, in a chunk of its own and
        seeing nothing before it through the convolutions."""
        y = [self.write(u) for u in x]
        for stream in (self.q, self.k, self.v):
            stream.seen = []
        self.t = -(-self.t // self.spec.chunk) * self.spec.chunk
        if self.state is not None:
            self.state = MemoryState(self.state.weights, self.state.momentum)
        return y

    def weights(self) -> list[Tensor]:
        """The weights now, each [H, a, o]."""
        if self.state is None:
            return list(self.initial)
        now = [w[0] for w in self.state.weights]
        if self.spec.decay_to == "zero":
            return now
        return [w0 + w for w0, w in zip(self.initial, now, strict=True)]

    def ask(self, q: Tensor, weights: list[Tensor]) -> Tensor:
        """M(q; W), q [H, d]."""
        f = q
        for n, w in enumerate(weights):
            if n:
                if self.spec.activation == "silu":
                    f = f * torch.sigmoid(f)
                else:
                    f = f * (1 + torch.erf(f / math.sqrt(2))) / 2
            f = torch.einsum("ha,hao->ho", f, w)
        if self.norm is None:
            return f
        f = f - f.mean(-1, keepdim=True)
        f = f / (f.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return q + self.norm[0] * f + self.norm[1]

    def write(self, x: Tensor) -> Tensor:
        """Writes k, v of x [D] and reads at q of x: [H, d]."""
        raw = self.p["memory.gates.weight"] @ x + self.p["memory.gates.bias"]
        step, alpha, eta = raw.sigmoid().view(self.config.heads, -1, 3).unbind(-1)
        ceiling = torch.minimum(torch.tensor(1 / 64), (1 - eta) / self.spec.chunk)
        at = (None, slice(None), None)
        y, self.state = oracle_memory(
            self.q(x)[at],
            self.k(x)[at],
            self.v(x)[at],
            (step * ceiling)[at],
            alpha[at],
            eta[at],
            self.initial,
            self.norm,
            self.spec,
            positions=torch.tensor([[self.t]]),
            state=self.state,
        )
        self.t += 1
        return y[0, :, 0]


def lmm(config: ModelConfig, p: P, x: list[Tensor]) -> list[Tensor]:
    memory = Memory(config, p)
    return [gated(config, p, memory.write(u), u) for u in x]


def gated(config: ModelConfig, p: P, y: Tensor, u: Tensor) -> Tensor:
    y = rms(y, p["memory.read_norm.weight"], config).flatten()
    gate = p["memory.output_gate.weight"] @ u
    return p["memory.out.weight"] @ (y * gate * torch.sigmoid(gate))


def mag(config: ModelConfig, p: P, x: list[Tensor]) -> list[Tensor]:
    memory, prefix, out = Memory(config, p), list(p.get("persistent", ())), []
    memory.after_persistent(prefix)
    for u, a in zip(x, windowed(config, p, x, prefix), strict=True):
        a = rms(a, p["attention_norm.weight"], config)
        m = rms(memory.write(u), p["memory.read_norm.weight"], config)
        out.append(p["memory.out.weight"] @ (a * m * torch.sigmoid(m)).flatten())
    return out


def mal(config: ModelConfig, p: P, x: list[Tensor]) -> list[Tensor]:
    memory, prefix = Memory(config, p), list(p.get("persistent", ()))
    reads = memory.after_persistent(prefix)
    before = [gated(config, p, y, u) for y, u in zip(reads, prefix, strict=True)]
    y = [gated(config, p, memory.write(u), u) for u in x]
    return [p["attention.o.weight"] @ a.flatten() for a in windowed(config, p, y, before)]


def mac(config: ModelConfig, p: P, x: list[Tensor]) -> list[Tensor]:
    maps = {n: p[f"attention.{n}.weight"] for n in "kv"}
    retrieved = maps
    if config.memory.projections == "block_diagonal":
        names = ["attention.o.weight", *(f"memory.{n}.weight" for n in ("q", "k", "v", "gates"))]
        p = {**p, **{n: torch.block_diag(*p[n].chunk(config.heads)) for n in names}}
        kv_heads = config.kv_heads or config.heads
        own = torch.block_diag(
            *torch.ones(kv_heads, maps["k"].shape[0] // kv_heads, config.width // kv_heads)
        )
        retrieved = {n: w * own for n, w in maps.items()}
    H, G, memory = config.heads, config.segment, Memory(config, p)
    asked, out = Stream(p, "q", H, True), []

    def key_value(u: Tensor, position: int, maps: P = maps) -> tuple[Tensor, Tensor]:
        k, v = (shared(config, maps[n] @ u) for n in "kv")
        return turned(k, position, config), v

    for t, u in enumerate(x):
        i = t % G
        if i == 0:  # a segment starts: its weights are frozen, its memory tokens to come
            frozen, pending, context, segment = memory.weights(), [], [], []
            context = [key_value(row, 0) for row in p.get("persistent", ())]
            if config.memory.retrieved == "learned":
                for row in p["asked"].transpose(0, 1):
                    query = row / row.norm(dim=-1, keepdim=True)
                    context.append(key_value(memory.ask(query, frozen).flatten(), 0, retrieved))
        query = asked(u)
        if config.memory.retrieved != "learned":
            pending.append(query)
            if len(pending) == (2 if config.memory.retrieved == "pool2" else 1):
                h = memory.ask(sum(pending) / len(pending), frozen)
                context.append(key_value(h.flatten(), i, retrieved))
                pending = []
        segment.append(key_value(u, i))
        keys, values = zip(*context, *segment)
        q = turned((p["attention.q.weight"] @ u).view(H, -1), i, config)
        y = p["attention.o.weight"] @ softmax_read(q, list(keys), list(values)).flatten()
        gate = torch.sigmoid(rms(memory.write(y), p["memory.read_norm.weight"], config))
        out.append(p["memory.out.weight"] @ (y * gate.flatten()))
    return out


MIXERS = {"mac": mac, "mag": mag, "mal": mal, "lmm": lmm, "transformer": attention}
