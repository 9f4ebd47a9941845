"""The native engine on CPUs: blocks of lanes in vector registers, blocks spread over threads, C++ from the system."""

from popart_func.engines.native.cpu.target import CPU

__all__ = ["CPU"]
