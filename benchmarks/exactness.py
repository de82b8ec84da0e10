"""How many greedy outputs equal vanilla's and transformers' own, on real prompts.

For each model and dtype, ``conflayers bench`` decodes the same prompts three ways, once each. On
smollm2-deep the plan leaves out the planted layers; on smollm2 it is a deliberately bad one, so
that most drafts are refused. Speeds are not the subject here: one run says little about them.

    python benchmarks/exactness.py --data prompts.jsonl --per-category 4 --output exactness.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from conflayers_cli.engine.builtin import ensure
from conflayers_cli.engine.model import fingerprint
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.outputs import write_json
from conflayers_cli.profile import DraftSettings, ModelFingerprint, Profile, SkipSection

BAD_PLAN = SkipPlan.of([3, 7, 9, 12, 20], [7, 12, 15, 21])


def save_profile(name: str, path: Path) -> None:
    """A profile with the planted plan, or the bad one where nothing is planted."""
    config: Any = AutoConfig.from_pretrained(ensure(name))
    planted = getattr(config, "conflayers_planted", None)
    plan = SkipPlan.of_layers(planted) if planted else BAD_PLAN
    Profile(
        model=ModelFingerprint.model_validate({"name": name, **fingerprint(config)}),
        skip=SkipSection.of(plan),
        draft=DraftSettings(max_tokens=6, stop_probability=0.0),
    ).save(path)


def choose(data: Path, per_category: int, target: Path) -> None:
    """The first prompts of every category that has so many."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line]
    sizes = Counter(row["category"] for row in rows)
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        category = row["category"]
        if sizes[category] > per_category * 2 and taken[category] < per_category:
            taken[category] += 1
            chosen.append(json.dumps(row))
    target.write_text("\n".join(chosen), encoding="utf-8")


def bench(profile: Path, data: Path, dtype: str, tokens: int) -> dict[str, Any]:
    """One ``conflayers bench --json`` run; exit code 3 (outputs differ) is a result too."""
    command = [
        *(sys.executable, "-m", "conflayers_cli.cli.main", "bench", "--profile", str(profile)),
        *("--data", str(data), "--dtype", dtype, "--max-new-tokens", str(tokens)),
        *("--runs", "1", "--warmup", "0", "--against", "transformers", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    # both lie in a folder that is gone afterwards
    document["settings"] |= {"profile": profile.name, "data": data.name}
    return document


def main() -> None:
    """Run every model in every dtype and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prompts with categories (JSONL)")
    parser.add_argument("--per-category", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=["smollm2", "smollm2-deep"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        choose(options.data, options.per_category, data)
        for model in options.models:
            profile = Path(folder) / f"{model}.yaml"
            save_profile(model, profile)
            for dtype in options.dtypes:
                document = bench(profile, data, dtype, options.max_new_tokens)
                results.append(document)
                own, theirs = document["identical_outputs"], document["identical_to_transformers"]
                print(
                    f"{model} {dtype}: {own['matching']}/{own['total']} equal vanilla's, vanilla "
                    f"equals transformers' in {theirs['matching']}/{theirs['total']}",
                    flush=True,
                )
                for parted in (*own["divergences"], *theirs["divergences"]):
                    print(f"  {parted}", flush=True)
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
