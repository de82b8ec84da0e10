"""A profile in words and in one-line pictures, for people."""

from __future__ import annotations

from conflayers_cli.profile.schema import DraftSettings, ModelFingerprint, Profile
from conflayers_cli.skip_plan import SkipPlan

UNICODE = "█▀▄·"
ASCII = "#^_."
LABEL = 12
"""Columns that the names of a description's lines take."""


def in_short(plan: SkipPlan, depth: int) -> str:
    """How much a plan leaves out, in words, and what weights the rest drafts with."""
    return skipped(plan, depth) + (f", {plan.weights} weights" if plan.weights else "")


def skips(plan: SkipPlan, depth: int) -> str:
    """What a plan leaves out, with the layers' numbers."""
    whole = set(plan.layers)
    parts = [" ".join(map(str, plan.layers))] if whole else []
    for name, indices in (("attention", plan.attention), ("mlp", plan.mlp)):
        if single := [str(i) for i in indices if i not in whole]:
            parts.append(f"{name} of {' '.join(single)}")
    return in_short(plan, depth) + (f": {', '.join(parts)}" if parts else "")


def skipped(plan: SkipPlan, depth: int) -> str:
    """How much a plan leaves out, in words."""
    single = len(plan.partial)
    sub_layers = f"{single} single sub-layer{'s' if single > 1 else ''}"
    if single and not plan.layers:
        return f"{sub_layers} of {depth} layers"
    return f"{len(plan.layers)} of {depth} layers" + (f" and {sub_layers}" if single else "")


def picture(plan: SkipPlan, depth: int, signs: str = UNICODE) -> str:
    """A plan as one sign for each layer.

    ``signs``: for a layer that runs, whose attention alone runs, whose MLP alone does, and that is
    left out.
    """
    attention, mlp = set(plan.attention), set(plan.mlp)
    return "".join(signs[2 * (i in attention) + (i in mlp)] for i in range(depth))


def legend(signs: str = UNICODE) -> str:
    """What the signs of `picture` mean."""
    both, attention, mlp, neither = tuple(signs)
    return f"{both} runs  {attention} attention alone  {mlp} MLP alone  {neither} left out"


def how_it_drafts(draft: DraftSettings) -> str:
    """One line about the draft settings of a plan that leaves something out."""
    leaves = ", with side candidates where they pay" if draft.tree else ""
    fixed = f"up to {draft.max_tokens} tokens, stops under probability {draft.stop_probability:g}"
    if draft.lookahead is False:
        return f"drafts {fixed}{leaves}"
    also = "" if draft.by == "skip" else ", n-grams too"
    return f"drafts as far as it pays{leaves}{also} (--no-adaptive-draft-length: {fixed})"


def figures_of(profile: Profile) -> str | None:
    """The device and dtype that a profile's figures were measured on; None: it does not say."""
    if (there := profile.environment) is None:
        return None
    threads = f", {there.threads} threads" if there.threads else ""
    return f"{there.device} in {there.dtype}{threads}"


def description(
    profile: Profile, *, title: str, tensors: str | None = None, signs: str = UNICODE
) -> list[str]:
    """A profile in words, line by line.

    Args:
        profile: the profile.
        title: the first line: the file and its schema version.
        tensors: the state of the tensors' file; None: there is none.
        signs: as for `picture`.
    """
    depth = profile.model.depth
    lines = [title, _line("model", _sizes(profile.model)), *_plan(profile, signs)]
    for each in profile.ranges or ():
        plan = each.skip.plan
        lines += [
            _line(f"from {each.from_context}", f"skips {skips(plan, depth)}"),
            _line("", picture(plan, depth, signs)),
            _line("", _drafting(each.draft, plan)),
        ]
    if profile.source is not None:
        lines.append(_line("source", profile.source))
    lines += _found(profile)
    if tensors is not None:
        lines.append(_line("tensors", tensors))
    return lines


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _sizes(model: ModelFingerprint) -> str:
    heads, grouped = model.attention_heads, ""
    if heads is not None and model.key_value_heads not in (None, heads):
        grouped = f" ({model.key_value_heads} for keys and values)"
    parts = [
        model.architecture,
        f"{model.depth} layers",
        None if model.hidden_size is None else f"hidden size {model.hidden_size}",
        None if heads is None else f"{heads} heads{grouped}",
        None if model.intermediate_size is None else f"MLP {model.intermediate_size}",
        None if model.vocabulary is None else f"vocabulary {model.vocabulary:,}",
        "other sizes not known" if model.lacks_sizes else None,
    ]
    return f"{model.name}: {', '.join(part for part in parts if part is not None)}"


def _plan(profile: Profile, signs: str) -> list[str]:
    plan, depth = profile.plan, profile.model.depth
    drafts = _line("drafts", _drafting(profile.draft, plan))
    if not plan:
        return [_line("skips", "nothing"), drafts]
    drawn = [_line("", picture(plan, depth, signs)), _line("", legend(signs))]
    return [_line("skips", skips(plan, depth)), *drawn, drafts]


def _drafting(draft: DraftSettings, plan: SkipPlan) -> str:
    skips = bool(plan) and draft.max_tokens > 0
    if draft.by == "none" or (draft.by in (None, "skip") and not skips):
        return "nothing: decoding is plain decoding"
    if draft.by == "ngram" or not skips:
        return "n-grams found in the text, where they pay"
    return how_it_drafts(draft).removeprefix("drafts ")


def _found(profile: Profile) -> list[str]:
    found, measured, there = profile.found_by, profile.measured, profile.environment
    lines = []
    if found is not None:
        refined = "refined" if found.refined else "not refined"
        settings = ", ".join(f"{key} {_plain(value)}" for key, value in found.settings.items())
        lines.append(_line("found by", f"{found.strategy}, {refined}; {settings or 'no settings'}"))
        used = f"{found.prompts.count} (sha256 {found.prompts.sha256[:12]}…), seed {found.seed}"
        lines.append(_line("prompts", used))
    device = figures_of(profile) or "a device that is not named"
    if measured is not None:
        figures = (
            (measured.measured_speedup, "{:.2f}× vanilla"),
            (measured.expected_speedup, "{:.2f}× expected"),
            (measured.acceptance_rate, "acceptance {:.1%}"),
            (measured.tokens_per_step, "{:.2f} tokens per step"),
        )
        known = [form.format(value) for value, form in figures if value is not None]
        lines += [
            _line("measured", f"{', '.join(known) or 'nothing'}; on {device}"),
            _line("", measured.conclusion),
            _line("searched", f"{measured.iterations} sets in {measured.seconds:.0f} s"),
        ]
    elif there is not None:
        lines.append(_line("found on", device))
    if there is not None:
        versions = f"conflayers {there.conflayers}, torch {there.torch}, "
        versions += f"transformers {there.transformers}, Python {there.python}"
        lines.append(_line("with", versions))
    return [line for line in lines if line.strip()]


def _plain(value: object) -> str:
    names: dict[object, str] = {None: "–", True: "yes", False: "no"}
    return names[value] if value is None or isinstance(value, bool) else str(value)
