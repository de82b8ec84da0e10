#!/bin/sh
# Measures a profile and holds it to its gates, in any CI: results are files in $OUT, the exit code
# says what became of it (see docs/ci.md). All settings come from the environment:
#
#   PROFILE     the profile to measure (needed)
#   MODEL       the model, where it isn't the one that the profile names
#   DATA        prompt file; without it the prompts of the package
#   BASELINE    an earlier bench.json to compare with; left out where there is no such file
#   FAIL_UNDER  the least speed-up over vanilla that is accepted (1.0: never slower)
#   TOLERANCE   by how much a figure may be lower than in BASELINE (5%)
#   RUNS        how often each prompt is decoded (3)
#   TOKENS      the most new tokens for each prompt (128)
#   OUT         folder for the results (bench-results)
#   CONFLAYERS  the command (conflayers)
#   UPDATE      1: what was measured becomes BASELINE, where all gates held
set -u

CONFLAYERS=${CONFLAYERS:-conflayers}
OUT=${OUT:-bench-results}

if [ -z "${PROFILE:-}" ]; then
    echo "ci-benchmark: PROFILE is not set: name the profile to measure" >&2
    exit 2
fi
mkdir -p "$OUT" || exit 1

set -- bench --profile "$PROFILE" \
    --runs "${RUNS:-3}" --max-new-tokens "${TOKENS:-128}" \
    --fail-under "${FAIL_UNDER:-1.0}" \
    --export-json "$OUT/bench.json" \
    --export-markdown "$OUT/bench.md" \
    --export-csv "$OUT/bench.csv" \
    --export-github "$OUT/github"
if [ -n "${MODEL:-}" ]; then
    set -- "$@" --model "$MODEL"
fi
if [ -n "${DATA:-}" ]; then
    set -- "$@" --data "$DATA"
fi
if [ -n "${BASELINE:-}" ] && [ -f "$BASELINE" ]; then
    set -- "$@" --compare "$BASELINE" --tolerance "${TOLERANCE:-5%}"
fi

# $CONFLAYERS may be several words, as in "python -m conflayers_cli".
# shellcheck disable=SC2086
$CONFLAYERS "$@"
code=$?

case $code in
    0)
        echo "ci-benchmark: all gates held" >&2
        if [ "${UPDATE:-0}" = 1 ] && [ -n "${BASELINE:-}" ]; then
            cp "$OUT/bench.json" "$BASELINE" || exit 1
        fi
        ;;
    2) echo "ci-benchmark: nothing was measured, or it can't be compared: see the line above" >&2 ;;
    3) echo "ci-benchmark: a gate did not hold; the results are in $OUT" >&2 ;;
    130) echo "ci-benchmark: interrupted" >&2 ;;
    *) echo "ci-benchmark: failed while working (code $code)" >&2 ;;
esac
exit "$code"
