"""Megatron and DeepSpeed, each behind one file; and arithmetic of layouts, which needs neither."""
