"""End to end as a table: rows of commands as a user types them, and what the run must be in the end.

How a row is written: tests/playing.py. tests/test_scenarios.py plays them, and prints the block of each with its
commands on top, ready to paste. What a fault does to a run is in tests/faults.
"""

from tests.playing import Row
from tests.stage import COMPILED

TINY = "$ hpc submit tiny.yaml launch.cluster=slurm"
TWO_NODES = f"{TINY} launch.instance=cedia-a100-40gb-nodes launch.nodes=2"
SWEEP = "$ hpc sweep tiny.yaml launch.cluster=slurm"

ROWS = [
    Row(
        "pack",
        "scans and a table into one HDF5 file, its checksums compared",
        "$ hpc pack scans/*.nii -o packed.h5 --labels scans/labels.csv --split 70/15/15\n"
        "$ hpc inspect packed.h5 --verify --png montage.png",
        state="no run",
    ),
    Row(
        "local-stop",
        "submitit's local executor, stopped with USR2 in mid-epoch, goes on by itself",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for step 50\nsignal USR2\nwait for end",
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    Row(
        "local-stop-compiling",
        "the same while its blocks are compiled, by the real compiler, before its first step",
        f"$ hpc submit {COMPILED}\nsignal USR2 during compilation\nwait for end",
        attempts=2,
        causes=("SIGUSR2",),
        weights="compiled",
        soak=True,
    ),
    Row(
        "local-cancel",
        "cancelled as it starts: it stops, and does not come back",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for attempt\n$ hpc cancel tiny\nwait for silence\n$ hpc ls",
        state="cancelled",
        causes=("SIGTERM",),
    ),
    Row(
        "local-kill",
        "kill -9 of the batch shell: the ranks save and leave; resume goes on",
        "$ hpc submit tiny.yaml launch.cluster=local\nwait for step 50\nsignal KILL\nwait for silence\n"
        "$ hpc resume tiny\nwait for end",
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "hpc-cancel",
        "hpc cancel ends a run for good",
        f"{TINY}\nwait for step 50\n$ hpc cancel tiny\nwait for the job to go\n$ hpc ls",
        cluster={},
        state="cancelled",
        causes=("SIGTERM",),
    ),
    Row(
        "hand-made",
        "sbatch of the run's own script by hand is the same run",
        f"partition gpu DOWN\n{TINY}\n$ hpc cancel tiny\nwait for the job to go\npartition gpu UP\n"
        "sbatch by hand\nwait for end",
        cluster={},
        weights="one-task",
    ),
    Row(
        "no-requeue",
        "where requeue is refused, the same script is submitted once more, under the same token",
        f"partition gpu DOWN\n{TINY}\n$ hpc cancel tiny\nwait for the job to go\npartition gpu UP\n"
        "$ sed -i s/--requeue/--no-requeue/ runs/*/job.sbatch\n"
        "sbatch by hand\nwait for step 50\nsignal USR2\nwait for end\n$ hpc ls",
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    Row(
        "requeue-off",
        "JobRequeue=0: the job asks for it itself, and comes back",
        f"{TINY} launch.partition=grace\nwait for step 50\npreempt\nwait for requeue\nwait for end",
        cluster={"job_requeue": 0},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "preempt-cancel",
        "PreemptMode=CANCEL: the job is ended for good; resume --all brings it back",
        f"$ hpc plan tiny.yaml launch.cluster=slurm\n{TINY}\nwait for step 50\npreempt\nwait for the job to go\n"
        "$ hpc ls\n$ hpc why tiny\n$ hpc resume --all\nwait for end",
        cluster={"preempt_mode": "CANCEL"},
        attempts=2,
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "requeue-unheard",
        "the controller is away when the tail asks for the requeue: it asks again",
        f"{TINY}\nwait for step 50\ncontroller stops\nsignal the ranks USR2\nwait for the tail\ncontroller starts\n"
        "wait for requeue\nwait for end",
        cluster={"message_timeout": 2},
        attempts=2,
        causes=("SIGUSR2",),
        weights="one-task",
    ),
    Row(
        "fsdp-two-nodes",
        "weights in shards over two nodes, stopped in mid-epoch, end as undisturbed ones",
        f"{TWO_NODES} train.strategy=fsdp\nwait for step 50\nsignal USR2\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="fsdp",
    ),
    Row(
        "zero-two-nodes",
        "the same with DeepSpeed's ZeRO 3",
        f"{TWO_NODES} train.strategy=deepspeed train.zero.stage=3\nwait for step 50\nsignal USR2\nwait for end",
        cluster={},
        attempts=2,
        causes=("SIGUSR2",),
        weights="zero",
    ),
    Row(
        "array-resume",
        "a row is cancelled, and a whole sweep; resume submits what is not finished, and nothing else",
        f"{SWEEP} train.keep=2,3,4 --max-parallel 2\n"
        "row 1 at step 30\ncancel row 1\nwait for row 0\nwait for row 2\n"
        "$ hpc ls tiny-sweep\n$ hpc resume tiny-sweep\nrow 1 at step 60\n"
        "$ hpc cancel tiny-sweep\nwait until none is under way\n$ hpc ls tiny-sweep\n"
        "$ hpc resume tiny-sweep\nwait for all",
        cluster={},
        attempts=(1, 3, 1),
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "array-here",
        "a sweep without SLURM, its controller stopped as it runs; resume goes on",
        "$ hpc sweep tiny.yaml train.keep=2,3 launch.cluster=local --max-parallel 1\nrow 0 at step 30\n"
        "$ hpc ls tiny-sweep\n$ hpc cancel tiny-sweep\nwait until none is under way\n"
        "$ hpc resume tiny-sweep\nwait for all\n"
        "$ hpc ls tiny-sweep",
        attempts=(2, 1),
        causes=("SIGTERM",),
        weights="one-task",
    ),
    Row(
        "pipeline",
        "pack, train and evaluate as one command, each after the other",
        "$ rm scans.h5\n$ hpc pipeline tiny.yaml launch.cluster=slurm train.epochs=2 --split validation"
        " --pack 'scans --labels scans/labels.csv --split 80/20/0'\n$ hpc ls\nwait for all\n"
        "$ ls runs/tiny-????????/predictions/validation.npz",
        cluster={},
    ),
    Row(
        "pipeline-here",
        "the same without SLURM",
        "$ rm scans.h5\n$ hpc pipeline tiny.yaml launch.cluster=local train.epochs=2 --split validation"
        " --pack 'scans --labels scans/labels.csv --split 80/20/0'\n$ hpc ls\nwait for all\n"
        "$ ls runs/tiny-????????/predictions/validation.npz",
    ),
    Row(
        "maps-on-two-nodes",
        "a segmentation of two stages with averaged weights, preempted in its second stage on two nodes",
        "$ hpc submit maps.yaml launch.cluster=slurm launch.instance=cedia-a100-40gb-nodes launch.nodes=2\n"
        "wait for step 20\npreempt\nwait for requeue\nwait for end\n$ hpc show tiny",
        cluster={},
        attempts=2,
        causes=("SIGTERM",),
        weights="two-tasks-maps",
    ),
    Row(
        "array-of-40",
        "forty rows as one array, four of them preempted as they run, the first and the last among them",
        f"{SWEEP} train.seed=0:40 data.batch_size=48\n"
        "row 0 at step 10\npreempt row 0\nrequeue row 0\nrow 7 at step 10\npreempt row 7\nrequeue row 7\n"
        "row 20 at step 10\npreempt row 20\nrequeue row 20\nrow 39 at step 10\npreempt row 39\nrequeue row 39\n"
        "wait for all\n$ hpc ls\n$ hpc ls tiny-sweep",
        cluster={"nodes": 4},
        attempts=tuple(2 if row in (0, 7, 20, 39) else 1 for row in range(40)),
        causes=("SIGTERM",),
        soak=True,
    ),
]
