#!/usr/bin/env bash
# The steps of this action:
#   verify.sh install   surgery into an environment of its own: of this repository, or INPUT_VERSION of the package index
#   verify.sh verify    check INPUT_CHECKPOINT, and leave verdict.json, junit.xml and summary.md
# What is given comes as INPUT_* in the environment, as action.yml sets it, and may be any text. The runner's own variables
# (RUNNER_TEMP, GITHUB_OUTPUT, GITHUB_STEP_SUMMARY) may be absent, so this runs by hand too. Exit codes are surgery's.
set -uo pipefail

temporary=${RUNNER_TEMP:-${TMPDIR:-/tmp}}
environment=$temporary/surgery-environment
results=$temporary/surgery-verify

refuse() {
    printf 'verify: %s\n' "$*" >&2
    exit 2
}

install() {
    local wanted root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd) || exit 2
    wanted=$root
    if [[ -n ${INPUT_VERSION:-} ]]; then
        [[ $INPUT_VERSION =~ ^[0-9][0-9A-Za-z.+!]*$ ]] || refuse "version is not one of a package; give such as 0.1.0"
        wanted=checkpoint-surgery==$INPUT_VERSION
    fi
    "${PYTHON:-python3}" -m venv "$environment" || exit 2
    # torch first, without CUDA: runners have no GPU, and the other build is ten times as large.
    pip_install torch --index-url https://download.pytorch.org/whl/cpu && pip_install "$wanted"
}

pip_install() {
    "$environment/bin/python" -m pip --disable-pip-version-check install --quiet "$@" || exit 2
}

# add OPTION TEXT: an option for each line that is not blank, in `arguments`.
add() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        line=${line%$'\r'}
        [[ $line =~ [^[:space:]] ]] && arguments+=("$1=$line")
    done <<<"$2"
}

verify() {
    local arguments=() python=$environment/bin/python guard code
    [[ -n ${INPUT_CHECKPOINT:-} ]] || refuse "no checkpoint is given; set the input 'checkpoint'"
    [[ -x $python ]] || python=python
    rm -rf "$results" && mkdir -p "$results" || exit 2
    tell "results=$results"
    add --against "${INPUT_AGAINST:-}"
    add --revision "${INPUT_REVISION:-}"
    add --text "${INPUT_TEXT:-}"
    add --calibration "${INPUT_CALIBRATION:-}"
    add --require "${INPUT_REQUIRE:-}"
    add --public-key "${INPUT_PUBLIC_KEY:-}"
    add --digest "${INPUT_DIGEST:-}"
    # Names in a checkpoint are shown, and a line of the log that starts with two colons would be a command to the runner.
    guard=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    [[ -z ${GITHUB_ACTIONS:-} ]] || printf '::stop-commands::%s\n' "$guard"
    "$python" -m surgery verify "${arguments[@]}" --json="$results/verdict.json" --junit="$results/junit.xml" \
        --summary="$results/summary.md" -- "$INPUT_CHECKPOINT" 2> >(tee "$results/log.txt" >&2)
    code=$?
    wait # for tee
    [[ -z ${GITHUB_ACTIONS:-} ]] || printf '::%s::\n' "$guard"
    if [[ ! -s $results/summary.md ]]; then # it was refused before there was a verdict
        printf '**surgery verify ended with exit code %s**\n\n' "$code" >"$results/summary.md"
        tail -n 1 "$results/log.txt" | cut -c -2000 | sed 's/^/    /' >>"$results/summary.md"
    fi
    [[ -z ${GITHUB_STEP_SUMMARY:-} ]] || cat "$results/summary.md" >>"$GITHUB_STEP_SUMMARY"
    tell "exit-code=$code"
    tell "passed=$([[ $code == 0 ]] && echo true || echo false)"
    return "$code"
}

tell() {
    [[ -z ${GITHUB_OUTPUT:-} ]] || printf '%s\n' "$1" >>"$GITHUB_OUTPUT"
}

case ${1-} in
install | verify) "$1" ;;
*) refuse "say install or verify" ;;
esac
