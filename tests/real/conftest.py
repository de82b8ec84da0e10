"""The built-in models, loaded once for all tests that need a real one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from conflayers_cli.models.builtin import BUILTIN
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.registry import WHEEL_COMMAND, WHEEL_PACKAGE


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of converted models: ``CONFLAYERS_CACHE`` if it is set, else this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("CONFLAYERS_CACHE"):
            # Converted once, for all processes of a parallel run: their folders are side by side.
            folder = tmp_path_factory.getbasetemp()
            if os.environ.get("PYTEST_XDIST_WORKER"):
                folder = folder.parent
            patch.setenv("CONFLAYERS_CACHE", str(folder / "conflayers"))
        has_wheel = importlib.util.find_spec(WHEEL_PACKAGE) is not None
        if not has_wheel and not all(model.folder.is_dir() for model in BUILTIN.values()):
            pytest.skip(f"the wheel with the built-in model is missing: {WHEEL_COMMAND}")
        yield Path(os.environ["CONFLAYERS_CACHE"])


@pytest.fixture(scope="session")
def smollm2(real_cache: Path) -> LoadedModel:
    """``smollm2`` in float32 on the CPU."""
    return load_model("smollm2", LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def smollm2_deep(real_cache: Path) -> LoadedModel:
    """``smollm2-deep`` in float32 on the CPU."""
    return load_model("smollm2-deep", LoadOptions(device="cpu", dtype="float32"))
