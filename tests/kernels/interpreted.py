"""Where tests of Triton kernels run: on a GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before triton is imported, hence in a process of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

KERNELS = Path(__file__).parents[2] / "conflayers_cli" / "kernels"

RUNS = DEVICE == "cuda" or INTERPRETED
"""Whether this process can run kernels."""

kernels_run = pytest.mark.skipif(
    not RUNS, reason="runs on a GPU, or within test_in_the_interpreter"
)
native = pytest.mark.skipif(DEVICE == "cpu", reason="runs on a GPU")
elsewhere = pytest.mark.skipif(RUNS, reason="this process runs the kernels itself")


def run_in_interpreter(file: str, least: int) -> None:
    """Run a file's tests with the interpreter: all must pass, and at least so many must run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton isn't installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed[1]) >= least


@contextmanager
def rounding_as_gpus_do() -> Iterator[None]:
    """Within: the interpreter rounds float32 to the nearest bfloat16. It cuts off by itself."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast: Callable[..., Any] = InterpreterBuilder.cast_impl

    def rounded(builder: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(builder, source, target)
        exact = torch.from_numpy(np.ascontiguousarray(source.data))
        data = exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(data.reshape(source.data.shape), target.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        yield


def runtime_arguments(file: str, kernel: str) -> set[str]:
    """The parameters of a kernel's function that are not known when it is compiled.

    Read from the source: importing it needs triton.
    """
    tree = ast.parse((KERNELS / file).read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    each = ((arg.arg, ast.unparse(arg.annotation or ast.Constant(None))) for arg in found.args.args)
    return {name for name, kind in each if kind != "tl.constexpr"}


class Recorder:
    """Stands for a kernel, and keeps what it is launched with.

    Attributes:
        grid: of the launch.
        compiled_for: the arguments whose every value has a kernel of its own.

    Args:
        file: of the kernels' folder, where the kernel is.
        kernel: its function's name.
    """

    def __init__(self, file: str, kernel: str) -> None:
        self.grid: tuple[int, ...] = ()
        self.compiled_for: dict[str, Any] = {}
        self._runtime = runtime_arguments(file, kernel)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: Any, **named: Any) -> None:
            self.grid = grid
            self.compiled_for = {k: v for k, v in named.items() if k not in self._runtime}

        return launch
