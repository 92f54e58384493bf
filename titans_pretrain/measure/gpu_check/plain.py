"""Training in one process where Megatron-core or DeepSpeed cannot be imported: the plain model and
torch's AdamW, with the bytes of ZeRO stage 1 on one rank (fp32 weights and moments beside bf16)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.measure.made import DTYPES
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM, initialise
from titans_pretrain.run.optim import learning_rate, param_groups


class PlainStep:
    """One rank's step without engines. No z-loss."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = TitansLM(config.model, dtype=DTYPES[config.train.precision], device=device)
        initialise(self.model, config.train.seed)
        self.model.recompute = config.train.recompute == "blocks"
        self.parameters = dict(self.model.named_parameters())
        # AdamW updates these; of an fp32 model they are its very weights.
        self.masters = {
            name: torch.nn.Parameter(p.detach().float()) for name, p in self.parameters.items()
        }
        o = config.optim
        groups = param_groups(self.masters.items(), kind, o)
        self.adamw = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def __call__(self, batches: Sequence[Batch], number: int) -> tuple[float, float]:
        """Update `number` (from 1): (loss in nats a label, gradient norm before clipping)."""
        tokens = max(1, sum(int(batch.loss_mask.sum()) for batch in batches))
        nats = torch.zeros((), device=self.device, dtype=torch.float64)
        for batch in batches:
            mask = batch.loss_mask.to(self.device)
            logits, _ = self.model(batch.tokens.to(self.device), batch.positions, carry=False)
            loss = token_loss(logits, batch.labels.to(self.device))[mask].sum()
            nats += loss.detach()
            torch.autograd.backward(loss / tokens)
            for name, p in self.parameters.items():  # accumulated in fp32, as ZeRO does
                master = self.masters[name]
                if p.grad is not None:
                    gradient = p.grad.float()
                    master.grad = gradient if master.grad is None else master.grad + gradient
                    p.grad = None
        o, masters = self.config.optim, self.masters.values()
        norm = torch.nn.utils.clip_grad_norm_(masters, o.clip)
        rate = learning_rate(number, o, self.config.train.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.masters[name])
        return float(nats) / tokens, float(norm)

    def held_bytes(self) -> dict[str, int]:
        states = [t for s in self.adamw.state.values() for t in s.values()]
        masters = [m for n, m in self.masters.items() if m.data_ptr() != _at(self.parameters[n])]
        return {
            "parameters": sum(p.nbytes for p in self.parameters.values()),
            "gradients": 0,
            "optimizer state": sum(t.nbytes for t in (*masters, *states)),
        }

    def content(self) -> str:
        """sha256 of weights and moments."""
        digest = hashlib.sha256()
        for name, master in sorted(self.masters.items()):
            state = self.adamw.state[master]
            for tensor in (master, *(state[key] for key in sorted(state))):
                flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + flat.numpy().data)
        return digest.hexdigest()


def _at(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()
