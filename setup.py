"""Builds the native library where there is a C++ compiler; everything else is in pyproject.toml.

Without one, or if it fails, the package installs all the same and runs by PyTorch.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -pthread -ffp-contract=off -Wall -Wextra"
# GCC's own headers for AVX-512 set off these
FLAGS += " -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
UNITS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_vnni": f"{AVX512} -mavx512vnni",
        "avx512_bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    },
    "aarch64": {"neon": ""},
}
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


class BuildNative(build_ext):
    """Compiles ``csrc/`` with the compiler that ``CXX`` names, with ``CONFLAYERS_CXXFLAGS``."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        machine = MACHINES.get(platform.machine(), platform.machine())
        out = Path(self.get_ext_fullpath(ext.name))
        try:
            self.build_library(UNITS[machine], out)
        except (KeyError, OSError, subprocess.CalledProcessError) as error:
            out.unlink(missing_ok=True)
            self.warn(f"no native library, decoding on a CPU will be slower: {error!r}")

    def build_library(self, units: dict[str, str], out: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*shlex.split(FLAGS), *shlex.split(os.environ.get("CONFLAYERS_CXXFLAGS", ""))]
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        work = {name: ("unit.cpp", f"-DUNIT={name} {more}") for name, more in units.items()}
        work |= {name: (f"{name}.cpp", "") for name in ("library", "threads")}

        def compiled(name: str) -> str:
            source, more = work[name]
            to = str(objects / f"{name}.o")
            command = [*compiler, *flags, *shlex.split(more), "-c", str(SOURCES / source), "-o", to]
            subprocess.run(command, check=True)
            return to

        with ThreadPoolExecutor(self.parallel or 2) as pool:
            found = list(pool.map(compiled, work))
        subprocess.run([*compiler, *flags, "-shared", *found, "-o", str(out)], check=True)


setup(
    ext_modules=[Extension("conflayers_cli.kernels.libconflayers", [])],
    cmdclass={"build_ext": BuildNative},
)
