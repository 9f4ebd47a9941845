"""The native engine on CUDA devices: a thread or a team of threads runs a lane; NVRTC compiles."""

from popart_func.engines.native.cuda.target import CUDA

__all__ = ["CUDA"]
