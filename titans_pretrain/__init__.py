"""Distributed pretraining of Titans language models."""
