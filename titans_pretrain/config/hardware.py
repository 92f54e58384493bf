"""What a GPU, and the machines it stands in, can do: the files of configs/hardware/."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from titans_pretrain.config.section import Positive, Section


class Figure(Section):
    """A number, and where it is from: a data sheet, a measurement, or why it is assumed."""

    value: Annotated[float, Field(gt=0)]
    source: Annotated[str, Field(min_length=8)]


class Share(Section):
    """Of what a data sheet promises, what is reached."""

    value: Annotated[float, Field(gt=0, le=1)]
    source: Annotated[str, Field(min_length=8)]


class HardwareConfig(Section):
    """GB and TFLOP are 10^9, 10^12; GiB 2^30. Rates of links are those of one GPU, one way."""

    name: str
    gpus_per_node: Positive
    memory_gib: Figure  # of one GPU, as CUDA reports it
    reserved_gib: Figure  # of it not for tensors: CUDA, NCCL, what the allocator cannot use
    bf16_tflops: Figure  # dense matrix products
    fp32_tflops: Figure
    memory_gb_per_s: Figure  # of the GPU's memory
    node_gb_per_s: Figure  # between GPUs of a node
    network_gb_per_s: Figure  # between nodes
    host_gb_per_s: Figure  # between a GPU and its host's memory
    node_latency_us: Figure  # of a message
    network_latency_us: Figure
    launch_us: Figure  # that the host takes for an operation of torch
    matmul: Share  # of the TFLOP/s, in layers' matrix products
    attention: Share
    memory: Share  # in the memory's small products, chunk by chunk
    links: Share  # of the GB/s

    def tflops(self, precision: str) -> float:
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops).value
