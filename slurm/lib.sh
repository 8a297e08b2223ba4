# shellcheck shell=bash
# Shared by the templates of this folder, which source it and call `train` or `run_once`. The settings it reads
# (D2V_SCALE_*) are explained in site.env.example.
#
# Order: run directory, code snapshot, nodes, preflight, launch, verdict, requeue.

set -uo pipefail

# shellcheck source=slurm/launch.bash
source "${BASH_SOURCE[0]%/*}/launch.bash"

say() { printf '%(%F %T)T %s\n' -1 "$*"; }

die() { say "error: $*"; exit 2; }

# One element of an array has the array's own number as its SLURM_JOB_ID, by which Slurm means all elements.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Left in the shell that submitted, they would count for more than what each rank is told here.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

job_field() { # one field of `scontrol show job`
    scontrol --oneliner show job "$job" 2> /dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# ---------------------------------------------------------------------------------------------- run directory and code

argument() { # value of one of train.py's arguments, from --name VALUE or --name=VALUE; the last one counts
    local i value=
    for ((i = 0; i < ${#arguments[@]}; i++)); do
        case ${arguments[i]} in
            "--$1="*) value=${arguments[i]#*=} ;;
            "--$1") value=${arguments[i + 1]:-} ;;
        esac
    done
    printf '%s' "$value"
}

find_run_dir() {
    local name=${SLURM_JOB_NAME}-${SLURM_JOB_ID}
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] && name=${SLURM_JOB_NAME}-${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    run_dir=$(argument resume)
    [[ -n $run_dir ]] || run_dir=$(argument run_dir)
    if [[ -z $run_dir ]]; then
        run_dir=${D2V_SCALE_RUNS:-$SLURM_SUBMIT_DIR/runs}/$name
        arguments+=(--run_dir "$run_dir")
    fi
    attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    logs=$run_dir/logs/$attempt
    mkdir -p "$logs" || die "cannot write to $run_dir"
    run_dir=$(cd "$run_dir" && pwd)
    logs=$run_dir/logs/$attempt
    say "run directory $run_dir, logs $logs"
}

find_package() { # sets package: the folder that d2v_scale lies in; more: what a clone has besides
    package=$repository more=(tools pyproject.toml)
    [[ -d $repository/d2v_scale ]] && return 0
    more=() # `d2v templates` has laid these files out, or they are those of an installed package
    local program
    for program in python python3; do
        package=$("$program" -c 'import os, d2v_scale
print(os.path.dirname(os.path.dirname(os.path.abspath(d2v_scale.__file__))))' 2> /dev/null) && return 0
    done
    die "no d2v_scale in $repository, nor is it installed here: set D2V_SCALE_ACTIVATE, or submit from a clone"
}

snapshot_code() { # a requeued job runs the code that it started with, whatever has been edited since
    code=$run_dir/code/$SLURM_JOB_ID
    if [[ ! -d $code ]]; then
        local partial
        partial=$run_dir/.code.$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.$$ # not mktemp's, which is for its owner only
        mkdir "$partial" || die "cannot write to $run_dir"
        # shellcheck disable=SC2154  # set by the template
        find_package
        tar --exclude=__pycache__ -cf - -C "$package" d2v_scale -C "$repository" ds_configs slurm "${more[@]}" |
            tar -C "$partial" -xf - || die "cannot copy the code from $repository to $run_dir"
        { git -C "$repository" rev-parse HEAD && git -C "$repository" status --short; } > "$partial/REVISION" 2> /dev/null
        { mkdir -p "$run_dir/code" && mv -T "$partial" "$code"; } || die "cannot write to $run_dir/code"
    fi
    source "$code/slurm/lib.sh" # these functions too are from then
    export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
}

# ------------------------------------------------------------------------------------------------------ nodes and ports

is_taken() { # whether something on this node, the job's first, listens to a port
    (exec 3<> "/dev/tcp/127.0.0.1/$1" || exec 3<> "/dev/tcp/$MASTER_ADDR/$1") 2> /dev/null
}

find_nodes() {
    local node offset
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export D2V_SCALE_NODES="${names[*]}"
    local gpus=${SLURM_GPUS_PER_NODE:-} # may be h100:8
    gpus=${gpus##*:}
    ranks=${D2V_SCALE_RANKS_PER_NODE:-${gpus:-${SLURM_GPUS_ON_NODE:-1}}}
    cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    node=$(scontrol --oneliner show node "${names[0]}" | tr ' ' '\n' | sed -n 's/^NodeAddr=//p')
    export MASTER_ADDR=${node:-${names[0]}}
    # Jobs that share a node, and attempts that follow each other at once, must not meet on a port.
    offset=$((SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}))
    export MASTER_PORT=$((20000 + (offset % 5000) * 2))
    while { is_taken "$MASTER_PORT" || is_taken $((MASTER_PORT + 1)); } && ((MASTER_PORT < 32000)); do
        say "port $MASTER_PORT is taken, looking further"
        ((MASTER_PORT += 2))
    done
    printf '%s slots='"$ranks"'\n' "${names[@]}" > "$logs/hostfile" || die "cannot write to $logs"
    say "${#names[@]} nodes (${names[*]}), $ranks ranks on each, first address $MASTER_ADDR:$MASTER_PORT"
    ((spares == 0)) || say "$spares of the nodes wait to take the place of one that is lost"
}

set_environment() {
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Compiled operators depend on the processor: keep them on the node.
    local cache=${TMPDIR:-/tmp}/d2v_scale-$UID
    export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/extensions} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
    local threads=$((cpus / ranks))
    [[ ${DS_ACCELERATOR:-} == cpu ]] && threads=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    # If the signal before the time limit gets lost, the ranks stop by themselves a little later.
    local end now margin
    end=$(job_field EndTime)
    [[ $end == 20* ]] || return 0 # no limit
    end=$(date -d "$end" +%s)
    now=$(date +%s)
    margin=$(((end - now) / 5 < 240 ? (end - now) / 5 : 240))
    export D2V_SCALE_DEADLINE=$((end - margin))
}

# ------------------------------------------------------------------------------------------------------------ containers

mounts() { # the folders that a run needs, one a line: mounts FOLDER... -- [arguments of the program]
    local words=() word folder known kept=()
    while [[ $1 != -- ]]; do words+=("$1/"); shift; done
    for word in "${@:2}"; do # every path among the arguments, up to its first wildcard
        [[ $word == --*=* ]] && word=${word#*=}
        while IFS= read -r word; do words+=("$word"); done < <(sed -E 's/,(vision|speech|text)=/\n/g; s/^(vision|speech|text)=//' <<< "$word")
    done
    for word in "${words[@]}"; do
        folder=${word%%[*?\[\{]*}
        [[ $folder == "$word" && -d $folder ]] || folder=${folder%/*}
        [[ $word == /* || $word == ./* || $word == ../* ]] && folder=$(cd "${folder:-/}" 2> /dev/null && pwd) || continue
        [[ $folder != / ]] || continue
        [[ $folder != *[,:]* ]] || die "a folder that is to be mounted may hold neither , nor : ($folder)"
        kept+=("$folder")
    done
    while IFS= read -r folder; do # sorted: what holds others comes before them
        [[ -n ${known:-} && $folder == "$known"/* ]] && continue
        known=$folder
        printf '%s\n' "$folder"
    done < <(printf '%s\n' "${kept[@]}" | sort -u)
}

set_container() { # from D2V_SCALE_CONTAINER: the words before a command, or options of srun; arguments as of `mounts`
    container=() container_options=()
    [[ -n ${D2V_SCALE_CONTAINER:-} ]] || return 0
    local kind=${D2V_SCALE_CONTAINER%%:*} image=${D2V_SCALE_CONTAINER#*:} folders more=() listed
    [[ -n $image && $image != "$D2V_SCALE_CONTAINER" ]] || kind=
    [[ -z ${D2V_SCALE_RUN_IN:-} ]] || die "give D2V_SCALE_CONTAINER or D2V_SCALE_RUN_IN, not both"
    listed=$(mounts "$@") || { printf '%s\n' "$listed"; exit 2; }
    mapfile -t folders <<< "$listed"
    [[ -z ${D2V_SCALE_CONTAINER_MOUNTS:-} ]] || IFS=, read -ra more <<< "$D2V_SCALE_CONTAINER_MOUNTS"
    folders+=("${more[@]}")
    case $kind in
        pyxis)
            listed=$(for folder in "${folders[@]}"; do # SOURCE:TARGET
                [[ $folder == *:* ]] && printf ',%s' "$folder" || printf ',%s:%s' "$folder" "$folder"
            done)
            container_options=("--container-image=$image" "--container-workdir=$PWD" "--container-mounts=${listed#,}") ;;
        apptainer | singularity)
            container=("$kind" exec --pwd "$PWD" --bind "$(IFS=, && printf '%s' "${folders[*]}")")
            [[ ${DS_ACCELERATOR:-} == cpu ]] || container+=(--nv)
            container+=("$image") ;;
        *) die "D2V_SCALE_CONTAINER=$D2V_SCALE_CONTAINER is neither pyxis:IMAGE nor apptainer:IMAGE" ;;
    esac
    # The image may have a search path of its own.
    container+=(env "PYTHONPATH=$code")
    say "in a container of $image ($kind), which sees ${folders[*]}"
}

set_python() { # sets python: words that start one from this shell; it needs no package but this one
    for python in python python3; do
        PYTHONPATH=$code "$python" -c 'import d2v_scale.running.attempts' 2> /dev/null && return 0
    done
    python=("${container[@]}" python)
    ((${#container_options[@]} == 0)) || python=(srun --nodes=1 --ntasks=1 --overlap --export=ALL
        "${container_options[@]}" "${python[@]}")
}

# ----------------------------------------------------------------------------------------------------- launch and signals

step_on_nodes() { # sets step: srun of a shell text on all nodes, the output of each in a file of its own;
    # step_on_nodes NAME TASKS_PER_NODE TEXT [options of srun]
    local log=$1 tasks_per_node=$2 text=$3
    local cpus_per_task=$((cpus / tasks_per_node > 0 ? cpus / tasks_per_node : 1))
    # shellcheck disable=SC2206  # options are separated by spaces
    step=(srun --ntasks=$((tasks_per_node * SLURM_NNODES)) --ntasks-per-node="$tasks_per_node"
        --cpus-per-task=$cpus_per_task --overcommit --kill-on-bad-exit=0 "${@:4}"
        --export=ALL # the list of `sbatch --export` was for the job; the ranks need all that is set here
        "${container_options[@]}" ${D2V_SCALE_SRUN_OPTIONS:-}
        bash -c "exec >> $(printf %q "$logs/$log")-\$SLURMD_NODENAME.log 2>&1; $text")
}

in_container() { # sets command_line: "$@", quoted for a shell, inside of the container if the site uses apptainer
    command_line="${D2V_SCALE_RUN_IN:-} $(printf '%q ' "${container[@]}" "$@")"
}

preflight() {
    [[ ${D2V_SCALE_PREFLIGHT:-1} == 1 ]] || return 0
    in_container python -m d2v_scale.running.preflight --run_dir "$run_dir" --report "$logs/preflight.json" \
        --data "$(argument data)" --min_free_gb "${D2V_SCALE_MIN_FREE_GB:-20}" \
        ${D2V_SCALE_PREFLIGHT_WAIT_S:+--wait_s "$D2V_SCALE_PREFLIGHT_WAIT_S"} \
        ${D2V_SCALE_PREFLIGHT_ALL_REDUCE_S:+--all_reduce_s "$D2V_SCALE_PREFLIGHT_ALL_REDUCE_S"}
    step_on_nodes preflight "$ranks" "exec $command_line" --wait=60
    MASTER_PORT=$((MASTER_PORT + 1)) "${step[@]}"
    local result=$?
    bad=$("${python[@]}" -c 'import json, sys
from d2v_scale.process.status import write_status
report = json.load(open(sys.argv[1]))
if report["exit_code"] != 0:
    write_status(sys.argv[2], report["exit_code"], report["text"])
if report["exit_code"] == 10:
    for node, problems in sorted(report["bad_nodes"].items()):
        print(node, ", ".join(problems).replace("\n", " "))
sys.exit(report["exit_code"])' "$logs/preflight.json" "$run_dir")
    local verdict=$?
    bad_nodes=$(cut -d" " -f1 <<< "$bad" | paste -sd,)
    [[ -s $logs/preflight.json ]] || { say "preflight gave no report (srun: $result); see $logs/preflight-*.log"; return 1; }
    return "$verdict"
}

# ---------------------------------------------------------------------------------------------------- verdict and requeue

requeue() {
    local state
    state=$(job_field JobState)
    # A job that its user cancelled must not come back, and one that is being preempted comes back by itself.
    [[ $state == RUNNING ]] || { say "not requeued here: the job is $state"; return 0; }
    scontrol requeue "$job" || { say "requeue refused: submit again with --resume $run_dir"; return 0; }
    if [[ -n ${bad_nodes:-} ]]; then
        local excluded
        excluded=$(job_field ExcNodeList)
        [[ $excluded == "(null)" ]] && excluded=
        scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$bad_nodes" && say "excluded $bad_nodes"
    fi
    trap - TERM
    sleep 300 # Slurm ends this shell
}

finish() { # the end of every attempt: status.json decides, exit codes are lost on the way through srun
    trap '' USR1 TERM
    local decision code
    decision=$("${python[@]}" -m d2v_scale.running.attempts "$run_dir" "$1")
    code=$?
    say "attempt $attempt ended with exit code $code: $decision"
    ((code == 0)) || say "what the ranks said: $logs/node-*.log"
    [[ $decision == requeue ]] && requeue
    exit "$code"
}

activate() { # the Python environment
    [[ -n ${D2V_SCALE_ACTIVATE:-} ]] || return 0
    # shellcheck disable=SC1090  # the site's own file
    source "$D2V_SCALE_ACTIVATE" || die "cannot source $D2V_SCALE_ACTIVATE"
}

read_point() { # sets point: this task's arguments of train.py, its line of the list that tools/sweep.py --slurm made
    local points
    mapfile -t points < "$D2V_SCALE_SWEEP"
    [[ -n ${points[SLURM_ARRAY_TASK_ID]:-} ]] || die "$D2V_SCALE_SWEEP has no line $((SLURM_ARRAY_TASK_ID + 1))"
    eval "point=(${points[SLURM_ARRAY_TASK_ID]})" # quoted by the program that wrote it
}

check_programs() {
    local program wanted=(python)
    [[ -n ${D2V_SCALE_RUN_IN:-}${D2V_SCALE_SRUN_OPTIONS:-} ]] || wanted+=(deepspeed)
    [[ -z ${D2V_SCALE_CONTAINER:-} ]] || wanted=()
    for program in "${wanted[@]}"; do
        command -v "$program" > /dev/null || die "no $program on PATH: set D2V_SCALE_ACTIVATE (slurm/site.env.example)"
    done
}

train() { # the whole job: train RECIPE DEEPSPEED_CONFIG [arguments of train.py, which come before these two]
    local recipe=$1 deepspeed_config=$2
    arguments=("${@:3}")
    stop_requested=0
    trap forward_signal USR1 TERM
    activate
    check_programs
    find_restarts
    find_run_dir
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && grep -q '"outcome": "done"' "$run_dir/status.json" 2> /dev/null; then
        say "this run is finished"
        exit 0
    fi
    rm -f "$run_dir/status.json"
    snapshot_code
    # MLflow's store lies beside the run directory.
    set_container "$run_dir" "${run_dir%/*}" "$repository" "$SLURM_SUBMIT_DIR" -- "${arguments[@]}"
    set_python
    if [[ -z $(argument resume) ]]; then
        [[ -n $(argument recipe) ]] || arguments+=(--recipe "$recipe")
        [[ -n $(argument deepspeed_config) ]] || arguments+=(--deepspeed_config "$code/ds_configs/$deepspeed_config")
    fi
    find_nodes
    set_environment
    local verdict=0
    preflight || verdict=$?
    ((verdict == 0)) || spares_suffice "$verdict" || finish "$verdict"
    ((stop_requested)) && say "asked to stop before the start"
    launch
    finish $?
}

run_once() { # one process on the first node, for evaluation and shards: run_once SCRIPT_OF_TOOLS [its arguments]
    activate
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    code=$repository
    set_container "$repository" "$SLURM_SUBMIT_DIR" -- "${@:2}"
    local program=("$repository/tools/$1") verb=${1%.py}
    [[ $verb != make_shards ]] || verb=shards
    [[ -f ${program[0]} ]] || program=(-m d2v_scale "$verb") # the installed package's
    in_container python "${program[@]}" "${@:2}"
    # shellcheck disable=SC2086  # options are separated by spaces
    exec srun --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
        "${container_options[@]}" ${D2V_SCALE_SRUN_OPTIONS:-} bash -c "exec $command_line"
}
