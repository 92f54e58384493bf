"""The memory in chunks."""

from __future__ import annotations

from titans_pretrain.memory.oracle import oracle_memory as chunked_memory

__all__ = ["chunked_memory"]
