# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables are lib.sh's, which sources this
# How the ranks of a job's nodes are started, by `deepspeed` or by the launchers that restart them, and its signals.

take_argument() { # the same, which is no argument of train.py's any more: sets taken
    local i kept=()
    [[ " ${arguments[*]: -1}" != " --$1" ]] || die "--$1 is the last word: give a number behind it"
    taken=$(argument "$1")
    for ((i = 0; i < ${#arguments[@]}; i++)); do
        case ${arguments[i]} in
            "--$1="*) ;;
            "--$1") ((i += 1)) ;;
            *) kept+=("${arguments[i]}") ;;
        esac
    done
    arguments=("${kept[@]}")
}

find_restarts() { # sets restarts, spares: how often ranks are started again, and nodes more than the world needs
    local default=0
    take_argument spares
    spares=${taken:-0}
    [[ $spares =~ ^0*$ ]] || default=3
    take_argument restarts
    restarts=${taken:-$default}
    [[ $spares$restarts =~ ^[0-9]+$ ]] || die "--spares $spares --restarts $restarts: give numbers, 0 or more"
    ((spares < SLURM_NNODES)) || die "--spares $spares: the job has $SLURM_NNODES nodes, and one has to train"
    ((spares == 0 || restarts > 0)) || die "--spares $spares --restarts 0: a spare node takes its place in a restart"
}

spares_suffice() { # whether the job can do without the nodes that preflight, which ended with $1, has named
    local count
    count=$(grep -c . <<< "$bad")
    (($1 == 10 && count > 0 && count <= spares)) || return 1
    rm -f "$run_dir/status.json"
    say "without $bad_nodes, which spare nodes replace: $(paste -sd';' <<< "$bad")"
}

forward_signal() {
    say "asked to stop: passing it on to the ranks"
    stop_requested=1
    # Again and again, as a rank may still be importing; a rank that knows ignores it.
    [[ -n ${srun_pid:-} && -z ${forwarder_pid:-} ]] || return 0
    (while kill -USR1 "$srun_pid" 2> /dev/null; do sleep 20; done) &
    forwarder_pid=$!
}

step_of_deepspeed() { # sets step: `deepspeed` on every node, each starting its own ranks
    # No ssh: the job's nodes need no login between each other, srun carries signals and environment, and Slurm can
    # account for and end every process. The launcher would die of USR1, and its outer half of TERM, leaving the ranks
    # behind: both are ignored from here on. train.py sets its own handlers.
    in_container deepspeed --no_ssh --no_ssh_check --hostfile "$logs/hostfile" --master_addr "$MASTER_ADDR" \
        --master_port "$MASTER_PORT"
    step_on_nodes node 1 "trap '' USR1 TERM
        exec $command_line --node_rank \$SLURM_NODEID $(printf '%q ' "$code/d2v_scale/train.py" "${arguments[@]}")" \
        --wait=60
}

step_of_launchers() { # sets step: `d2v train` on every node, spare ones too, which meet in a folder of the run directory
    # The step must outlive a lost node and its launcher: the others go on.
    local node
    local -A address why
    mkdir -p "$logs/meet" || die "cannot write to $logs"
    while read -r node address_of_node; do address[$node]=$address_of_node; done < <(
        scontrol --oneliner show node "$SLURM_JOB_NODELIST" |
            sed -nE 's/^NodeName=([^ ]+) .*NodeAddr=([^ ]+).*/\1 \2/p')
    while read -r node problem; do [[ -z $node ]] || why[$node]=$problem; done <<< "${bad:-}"
    for node in "${names[@]}"; do
        printf '%s %s %s\n' "$node" "${address[$node]:-$node}" "${why[$node]:-}"
    done > "$logs/meet/nodes" || die "cannot write to $logs"
    export D2V_SCALE_SCRIPT_NODE=${SLURMD_NODENAME:-}
    in_container python -m d2v_scale train --meet "$logs/meet" --ranks "$ranks" --restarts "$restarts" --spares "$spares"
    step_on_nodes node 1 "trap '' USR1 TERM
        exec $command_line --node \$SLURMD_NODENAME $(printf '%q ' "${arguments[@]}")" --wait=0 --no-kill
}

excluded_nodes() { # sets bad_nodes: those that the launchers have excluded, which a requeued job is not to get again
    bad_nodes=$("${python[@]}" -c 'import glob, json, sys
plans = sorted(glob.glob(glob.escape(sys.argv[1]) + "/plan-*.json"))
print(",".join(sorted(json.load(open(plans[-1]))["excluded"])) if plans else "")' "$logs/meet")
    [[ -z $bad_nodes ]] || say "the launchers have excluded $bad_nodes"
}

launch() {
    if ((restarts > 0)); then step_of_launchers; else step_of_deepspeed; fi
    "${step[@]}" &
    srun_pid=$! # of srun itself, not of a subshell: it gets the signals
    ((stop_requested)) && forward_signal
    local result
    while :; do # `wait` also returns when a signal arrives
        wait "$srun_pid"
        result=$?
        kill -0 "$srun_pid" 2> /dev/null || break
    done
    [[ -n ${forwarder_pid:-} ]] && kill "$forwarder_pid" 2> /dev/null
    ((restarts == 0)) || excluded_nodes
    return "$result"
}
