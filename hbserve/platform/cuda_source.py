"""Kernels in CUDA C++, compiled by NVRTC when a process starts, for what Triton does not offer: clusters of blocks.

NVRTC comes with torch's wheels for CUDA. A kernel is compiled for constants, which its source knows as macros, in about
a second, and kept in the cache folder. It can be launched into a stream that is being captured.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hbserve.cache_folder import cache_folder
from hbserve.platform.cuda_driver import call

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)
_CLUSTER, _OVERLAP = 4, 6
"""Launch attributes of the driver: the dimensions of a cluster, and programmatic stream serialisation."""
_MAX_SHARED_BYTES, _LARGE_CLUSTERS = 8, 14
"""Function attributes of the driver: maximum dynamic shared memory, and clusters that not every GPU has."""
_MAX_PORTABLE_CLUSTER = 8
_DIGEST_BYTES = hashlib.sha256().digest_size
"""A kept kernel begins with its digest: a broken file is compiled again."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def can_compile(device: torch.device) -> bool:
    """Whether kernels with clusters can be compiled for ``device``: from Hopper on, where NVRTC is installed."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _HOPPER
        and _compiler_library() is not None
    )


class ClusterKernel:
    """A compiled kernel of clusters of ``cluster_size`` blocks along x; torch's context must be current.

    Args:
        source: has the kernel as ``extern "C"`` function ``name``, and an integer ``shared_bytes`` in constant memory:
            the dynamic shared memory of a block.
        macros: constants that the source is compiled for.
        num_threads: of a block.

    Attributes:
        fits: whether a cluster has room on the multiprocessors of the current stream.
    """

    def __init__(
        self, source: Path, name: str, macros: Mapping[str, int], num_threads: int, cluster_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._num_threads, self._cluster_size = num_threads, cluster_size
        binary = _compiled(source, macros, torch.cuda.get_device_capability(device))
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), binary)
        call("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())
        address, num_bytes, shared_bytes = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        call("cuModuleGetGlobal_v2", ctypes.byref(address), ctypes.byref(num_bytes), self._module, b"shared_bytes")
        call("cuMemcpyDtoH_v2", ctypes.byref(shared_bytes), address, num_bytes)
        self._shared_bytes = shared_bytes.value
        call("cuFuncSetAttribute", self._function, ctypes.c_int(_MAX_SHARED_BYTES), shared_bytes)
        if cluster_size > _MAX_PORTABLE_CLUSTER:
            call("cuFuncSetAttribute", self._function, ctypes.c_int(_LARGE_CLUSTERS), ctypes.c_int(1))
        self.fits = self._max_clusters() > 0

    def _max_clusters(self) -> int:
        """Return how many clusters the multiprocessors of the current stream run at a time."""
        stream: Any = torch.cuda.current_stream()
        count, config = ctypes.c_int(), self._config(1, stream.cuda_stream, overlap=False)
        try:
            call("cuOccupancyMaxActiveClusters", ctypes.byref(count), self._function, ctypes.byref(config))
        except RuntimeError as error:  # the stream's multiprocessors are in no group of a cluster's size
            logger.info("no clusters of %d blocks here: %s", self._cluster_size, error)
        return count.value

    def launch(self, num_clusters: int, *arguments: Any, overlap: bool) -> None:
        """Queue the kernel in the current stream.

        Args:
            arguments: tensors, whose addresses the kernel gets, and ctypes values.
            overlap: it may begin before the kernel before it has ended, as a Triton kernel with ``launch_pdl``.
        """
        values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        stream: Any = torch.cuda.current_stream()
        config = self._config(num_clusters, stream.cuda_stream, overlap)
        call("cuLaunchKernelEx", ctypes.byref(config), self._function, addresses, None)

    def _config(self, num_clusters: int, stream: int | None, overlap: bool) -> _LaunchConfig:
        attributes = (_Attribute * 2)()
        attributes[0].id, attributes[0].value[:3] = _CLUSTER, (self._cluster_size, 1, 1)
        attributes[1].id, attributes[1].value[0] = _OVERLAP, 1
        return _LaunchConfig(
            (num_clusters * self._cluster_size, 1, 1), (self._num_threads, 1, 1), self._shared_bytes, stream,
            attributes, 2 if overlap else 1,
        )  # fmt: skip


def _compiled(source: Path, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Return the machine code for one kind of GPU: from the cache folder, or compiled and kept there."""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}"]
    options += [f"--define-macro={name}={value}" for name, value in macros.items()]
    text = source.read_bytes()
    key = hashlib.sha256(repr((text, options, torch.version.cuda)).encode()).hexdigest()
    kept = cache_folder() / "kernels" / f"{source.stem}-{key[:32]}.cubin"
    try:
        content = kept.read_bytes()
        digest, binary = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest == hashlib.sha256(binary).digest():
            return binary
    except OSError:
        pass
    binary = _compile(text, source.name, options)
    try:  # whole or not at all: other processes read it
        kept.parent.mkdir(parents=True, exist_ok=True)
        own = kept.with_suffix(f".{os.getpid()}")
        own.write_bytes(hashlib.sha256(binary).digest() + binary)
        own.replace(kept)
    except OSError as error:
        logger.info("cannot keep a compiled kernel in %s: %s", kept.parent, error)
    return binary


def _compile(text: bytes, name: str, options: list[str]) -> bytes:
    library = _compiler_library()
    assert library is not None, "NVRTC is installed"
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if library.nvrtcCompileProgram(program, len(options), given):
            log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}: {log.decode(errors='replace')}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: error {code}")


@cache
def _compiler_library() -> Any | None:
    """Return NVRTC, of torch's wheels or of the system."""
    if torch.version.cuda is None:
        return None
    beside_torch = Path(torch.__file__).parents[1] / "nvidia"
    version = torch.version.cuda.partition(".")[0]
    for library in sorted(beside_torch.glob(f"*/lib/libnvrtc.so.{version}*")):
        for part in library.parent.glob(f"libnvrtc-builtins.so.{version}*"):
            ctypes.CDLL(str(part))  # NVRTC finds it only if it is loaded
        return ctypes.CDLL(str(library))
    try:
        return ctypes.CDLL(f"libnvrtc.so.{version}")
    except OSError:
        return None
