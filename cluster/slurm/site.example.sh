# What this site needs; copy it to site.sh, which git ignores, and keep what holds. Each job's script reads it on the
# first node before it starts Ray, and what it exports reaches all nodes.

# The environment: by default the one that submit.py was called in.
# module load cuda/12.8
# source /project/iaml-pipeline/.venv/bin/activate

# The network between the nodes.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# In a container, whose own copy of the code gives way to this one: with Apptainer,
# export PYTHONPATH=$PWD
# IN_CONTAINER=(apptainer exec --nv --bind /project --pwd "$PWD" /project/images/iaml.sif)
# or with Pyxis and enroot.
# SRUN_OPTIONS=(--container-image=/project/images/iaml.sqsh --container-mounts=/project,/tmp --container-workdir="$PWD")

# Where Ray keeps its sockets and logs while the job runs, on each node: a local disk and a short path, which the job
# makes and deletes again; one that is there already is left alone, and the job fails.
# RAY_FOLDER=/scratch/ray-$SLURM_JOB_ID

# Seconds to write a checkpoint after the signal; less than those of --signal=B:USR1@180.
# GRACE_S=120
# Seconds within which all nodes must have started Ray.
# START_S=300
