"""Memory use in tests: `with LiveBytes() as live: ...; live.peak`."""

from titans_pretrain.memory.live_bytes import LiveBytes

__all__ = ["LiveBytes"]
