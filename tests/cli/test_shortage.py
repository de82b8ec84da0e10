"""The command line under a limit on memory: one line that says what for, and exit code 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, save_model

MIB = 2**20
# The limit comes once all is imported, which itself takes gigabytes of addresses.
SCRIPT = """
import resource, re, sys
import conflayers_cli.cli.common, conflayers_cli.generation.generator, conflayers_cli.models.loader
import torch._dynamo
from conflayers_cli.cli.main import main
text = open("/proc/self/status").read()
size = int(re.search(r"VmSize:\\s*(\\d+) kB", text)[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="addresses are limited otherwise")


def limited(mebibytes: int, *arguments: object) -> tuple[int, str]:
    """(exit code, what it said) of the command line with so much more memory than its imports."""
    command = [sys.executable, "-c", SCRIPT, str(mebibytes * MIB), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    told = done.stderr.decode()
    assert done.stdout == b"" and "Traceback" not in told
    # Libraries that are imported before the command line begins have a say, too.
    ours = [line for line in told.splitlines() if line.startswith("conflayers")]
    return done.returncode, "\n".join(ours)


@linux
def test_a_cache_that_does_not_fit(tmp_path: Path) -> None:
    large = save_model(tmp_path / "model", max_position_embeddings=10**9)
    # 640 bytes a token
    arguments = ("generate", "hi", "--raw", "-m", large, "--dtype", "float32")
    code, said = limited(400, *arguments, "-n", 1_600_000)
    assert code == 1
    what = "keys and values of a text of up to 1,600,002 tokens"
    assert said.startswith(f"conflayers: error: out of memory: {what} (977 MiB) don't fit: lower")
    assert "--max-new-tokens" in said and said.count("\n") == 0


@linux
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    large = save_model(tmp_path / "model", hidden_size=1024, intermediate_size=8192)
    code, said = limited(160, "generate", "hi", "--raw", "-m", large, "--dtype", "float32")
    assert code == 1
    assert said.startswith(f"conflayers: error: out of memory: the weights of {large} don't fit")
    assert "--dtype bfloat16" in said and "--quantize" in said and said.count("\n") == 0


def test_a_context_without_bounds_is_no_licence(run: Run, tmp_path: Path) -> None:
    endless = save_model(tmp_path / "model", max_position_embeddings=10**9)
    result = run("generate", "hi", "--raw", "-m", endless, "-n", 10**9, "--dtype", "float32")
    assert (result.code, result.out) == (1, "")
    assert "need 596" in result.err and "GiB" in result.err
    assert "--max-new-tokens" in result.err.splitlines()[-1]
