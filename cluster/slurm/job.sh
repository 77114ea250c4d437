#!/bin/bash
# Runs a command on a Ray cluster that lives as long as this Slurm job. `submit.py` queues it; so does
#     sbatch --nodes 2 --gpus-per-node 8 --time 8:00:00 cluster/slurm/job.sh python pipeline/train.py ...
# from the root of the repository, whose folder all nodes must see.
#
#   every node     ray_node: Ray's processes, on the first node its head; what they wrote is removed when they end
#   first node     supervisor.py: waits for all nodes, then runs the command, which finds Ray by RAY_ADDRESS
#   SIGUSR1        ahead of the time limit or of pre-emption: the command writes a checkpoint, and the job is requeued
#   a lost node    the job is requeued; the command resumes from its newest checkpoint
#SBATCH --job-name=iaml
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

GRACE_S=120           # for the command to write a checkpoint after the signal, less than the 180 s above
START_S=300           # for all nodes to start Ray
MOST_RESTARTS=20      # after lost nodes, so that a job that breaks them does not go on for ever
SRUN_OPTIONS=()       # for srun, such as Pyxis' --container-image
IN_CONTAINER=()       # before each command on a node, such as apptainer exec --nv IMAGE
RAY_FOLDER=/tmp/ray-$SLURM_JOB_ID    # on each node; a short path, since sockets lie in it
site=${IAML_SITE:-cluster/slurm/site.sh}
# shellcheck source=/dev/null
if [ -f "$site" ]; then source "$site"; fi

# two jobs on a node must not share ports; consecutive jobs don't
PORT=$((20000 + SLURM_JOB_ID % 1000 * 10))
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
INTERRUPTED=75 LOST=76 # exit statuses, the latter of supervisor.py and of ray_node
export PORT HOSTS RAY_FOLDER START_S GRACE_S LOST
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
# srun takes these from its options alone, unless it is told to take them from the job
export SLURM_EXPORT_ENV=ALL
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

ray_node() {
    # a job that was requeued may find what it left when it was killed; whatever else has this name is not its own
    if [ -f "$RAY_FOLDER/job-$SLURM_JOB_ID" ]; then rm -rf "$RAY_FOLDER"; fi
    mkdir -m 700 "$RAY_FOLDER" && touch "$RAY_FOLDER/job-$SLURM_JOB_ID" || exit 1
    export TMPDIR=$RAY_FOLDER
    # Ray waits for its head to be idle before it ends, which one that has trained never is
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
    trap 'rm -rf "$RAY_FOLDER"' EXIT
    trap 'ending=1; kill $ray 2> /dev/null' TERM USR2
    local ending='' ray='' options=(--block --disable-usage-stats --temp-dir="$RAY_FOLDER"
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
        --metrics-export-port=$((PORT + 1)) --dashboard-agent-listen-port=$((PORT + 2))
        --dashboard-agent-grpc-port=$((PORT + 3)) --runtime-env-agent-port=$((PORT + 4))
        --node-manager-port=$((PORT + 5)) --object-manager-port=$((PORT + 6)))
    if [ "$SLURM_NODEID" = 0 ]; then
        options+=(--head --node-ip-address="$SLURM_LAUNCH_NODE_IPADDR" --port="$PORT"
            --dashboard-host=127.0.0.1 --dashboard-port=$((PORT + 7)) --ray-client-server-port=$((PORT + 8)))
    else
        options+=(--address="$SLURM_LAUNCH_NODE_IPADDR:$PORT")
        until (: < "/dev/tcp/$SLURM_LAUNCH_NODE_IPADDR/$PORT") 2> /dev/null || [ "$ending" ]; do
            if [ "$SECONDS" -gt "$START_S" ]; then exit 1; fi
            sleep 0.5
        done
    fi
    if [ "$ending" ]; then exit; fi
    ray start "${options[@]}" > "$RAY_FOLDER/start.log" 2>&1 &
    ray=$!
    wait "$ray"
    wait "$ray" # the first one ends with the signal
    if [ "$ending" ]; then exit; fi
    echo "Ray ended on $(hostname):"
    tail -n 30 "$RAY_FOLDER/start.log"
    if grep -q "Ray runtime started" "$RAY_FOLDER/start.log"; then exit "$LOST"; fi
    exit 1
}

run_command() {
    export TMPDIR=$RAY_FOLDER
    exec python cluster/slurm/supervisor.py --address "$SLURM_LAUNCH_NODE_IPADDR:$PORT" --hosts "$HOSTS" \
        --start-s "$START_S" --grace-s "$GRACE_S" -- "$@"
}

# as text, since not every container lets functions in the environment through
in_step() { echo "$(declare -f "$1"); $1 \"\$@\""; }

# srun passes SIGUSR2 on; SIGTERM would make it kill its step at once
end_ray() {
    kill -USR2 "$nodes" 2> /dev/null
    sleep 15 & # srun waits longer than that for a node that is lost
    local alarm=$!
    wait -n "$nodes" "$alarm"
    kill "$alarm" 2> /dev/null
}

requeue() {
    echo "$1; the job is requeued and resumes from its newest checkpoint"
    end_ray
    kill -KILL "$nodes" "$command" 2> /dev/null # they would wait for a node that is lost
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script meanwhile
    exit 1
}

srun "${SRUN_OPTIONS[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    "${IN_CONTAINER[@]}" bash -c "$(in_step ray_node)" &
nodes=$!
srun "${SRUN_OPTIONS[@]}" --overlap --nodes=1 --ntasks=1 --gpus-per-node=0 \
    "${IN_CONTAINER[@]}" bash -c "$(in_step run_command)" bash "$@" &
command=$!
trap 'kill -USR2 "$command" 2> /dev/null' USR1
trap 'end_ray; exit 143' TERM

while kill -0 "$nodes" 2> /dev/null && kill -0 "$command" 2> /dev/null; do wait -n "$nodes" "$command"; done
if kill -0 "$command" 2> /dev/null; then
    wait "$nodes"
    status=$?
    # until Slurm notices that a node is lost, it may give it again; a first start that fails is at fault itself
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then status=$LOST; fi
    kill -KILL "$command"
else
    wait "$command"
    status=$?
fi
case $status in
    "$INTERRUPTED") requeue "the command was preempted" ;;
    "$LOST") if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then requeue "a node was lost"; fi ;;
esac
end_ray
exit "$status"
