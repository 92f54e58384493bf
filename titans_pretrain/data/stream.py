"""step -> batches of one rank, and the few numbers that resume them."""

from titans_pretrain.data.batch import Batch, batch_hash

__all__ = ["Batch", "batch_hash"]
