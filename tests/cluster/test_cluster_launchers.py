"""The variables of each launcher, as its documentation lists them, give the right ranks or name the remedy.

Slurm: srun(1), OUTPUT ENVIRONMENT VARIABLES (slurm.schedmd.com/srun.html); LaunchParameters=use_interactive_step and
    InteractiveStepOptions in slurm.conf(5); SLURM_MAX_NORMAL_STEP_ID and SLURM_INTERACTIVE_STEP in slurm/slurm.h.
Open MPI: "Environment variables set for MPI applications"
    (docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html).
MPICH: its launcher documents none; these are what mpiexec.hydra 4.0.2 sets (PMI_SIZE, PMI_RANK, MPI_LOCALRANKID,
    MPI_LOCALNRANKS: src/pm/hydra/tools/bootstrap and proxy).
MVAPICH2: "MVAPICH2 User Guide" (mvapich.cse.ohio-state.edu/userguide), MV2_COMM_WORLD_LOCAL_RANK; all four are set in
    src/pm/mpirun/mpispawn.c, setup_local_environment.
Cray PALS: PALS_RANKID, PALS_LOCAL_RANKID, PALS_NODEID, PMI_SIZE, PMI_LOCAL_SIZE as Slurm's plugin for it lists them
    (SchedMD/slurm:src/plugins/mpi/cray_shasta/mpi_cray_shasta.c); mpiexec's own manual page is not public.
Flux: flux-environment(7) (flux-framework.readthedocs.io/projects/flux-core/en/latest/man7/flux-environment.html).
Kubeflow: kubeflow/training-operator:pkg/controller.v1/pytorch/envvar.go (PyTorchJob), and "PyTorch Guide" of Kubeflow
    Trainer (kubeflow.org/docs/components/trainer/user-guides/pytorch) for PET_* alone.
AzureML: "Distributed GPU training guide" (learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu);
    AZ_BATCH_MASTER_NODE: "Azure Batch runtime environment variables"
    (learn.microsoft.com/azure/batch/batch-compute-node-environment-variables).
"""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.cluster.ranks import LAUNCHERS, UNKNOWN, Ranks, discover_ranks
from llm.errors import InputError

PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
ALLOCATION = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu_node[01-02]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
# In the shell that salloc starts on the first node; PMIX_RANK where MpiDefault is pmix.
INTERACTIVE = {
    **BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEPID": "4294967290", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "gpu_node01",
    "PMIX_RANK": "0",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu_node[01-02]",
}  # fmt: skip
OPENMPI = dict(zip(LAUNCHERS["openmpi"], ("5", "1", "8", "4"), strict=True))
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
PALS = {
    "PALS_APID": "x", "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_NODEID": "1",
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4",
}  # fmt: skip
PALS_PMIX = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PMIX_RANK": "5"}
FLUX = {
    "FLUX_JOB_ID": "f2", "FLUX_JOB_SIZE": "8", "FLUX_JOB_NNODES": "2", "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "5", "PMI_SIZE": "8",
}  # fmt: skip
KUBEFLOW = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2",
    "RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1",
}  # fmt: skip
TRAINER = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}  # fmt: skip
AZUREML = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.4",
    "MASTER_PORT": "6105",
}  # fmt: skip


def without(environ: dict, *names: str) -> dict:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (SRUN, "slurm"),
        ({**INTERACTIVE, **SRUN}, "slurm"),  # srun, typed in salloc's shell
        ({**SRUN, "PMIX_RANK": "5"}, "slurm"),  # srun --mpi=pmix
        ({**SRUN, **PALS}, "slurm"),  # srun --mpi=cray_shasta
        (OPENMPI, "openmpi"),
        ({**INTERACTIVE, **OPENMPI}, "openmpi"),
        (MVAPICH2, "mvapich2"),
        (MPICH, "mpich"),
        (without(PALS, "PALS_APID", "PALS_RANKID", "PALS_LOCAL_RANKID", "PALS_NODEID"), "mpich"),  # Cray's PMI alone
        (PALS, "pals"),
        ({**PALS_PMIX, "WORLD_SIZE": "8"}, "pals"),
        (FLUX, "flux"),
        (without(FLUX, "PMI_RANK", "PMI_SIZE"), "flux"),  # flux run -o pmi=none
        ({**FLUX, **without(PALS, "PMI_RANK", "PMI_SIZE")}, "flux"),  # its plugin for Cray sets PALS_*
        ({**AZUREML, "LOCAL_WORLD_SIZE": "4"}, "environment"),
    ],
)  # fmt: skip
def test_ranks(environ, launcher):
    environ = {"SLURM_JOB_ID": "4711", **PLACE, **environ} if launcher == "slurm" else {**PLACE, **environ}
    ranks = discover_ranks(environ)
    assert ranks == Ranks(5, 1, 8, 4, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), launcher)


@pytest.mark.parametrize(
    "environ",
    [
        KUBEFLOW,
        {**KUBEFLOW, "PET_NPROC_PER_NODE": "1"},
        without(KUBEFLOW, "PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK"),  # older operators
    ],
)
def test_kubeflow_with_one_process_per_pod(environ):
    assert discover_ranks(environ) == Ranks(1, 0, 2, 1, "job-master-0", 23456, "kubeflow")


def test_azureml_mpi_has_the_host_of_rank_0():
    ranks = discover_ranks({**OPENMPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"})
    assert (ranks.master_addr, ranks.master_port) == ("10.0.0.4", 6000)
    ranks = discover_ranks({**OPENMPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000", "MASTER_PORT": "6105"})
    assert (ranks.master_addr, ranks.master_port) == ("10.0.0.4", 6105)


def test_a_slurm_host_may_have_an_underscore():
    assert discover_ranks({**ALLOCATION, **SRUN}).master_addr == "gpu_node01"


@pytest.mark.parametrize("environ", [ALLOCATION, BATCH, INTERACTIVE, {"WORLD_SIZE": "1"}, {"PET_NNODES": "1"}])
def test_what_is_one_process(environ):
    ranks = discover_ranks(environ)
    assert (ranks.rank, ranks.world_size, ranks.launcher) == (0, 1, "python")


@pytest.mark.parametrize(
    ("environ", "remedy"),
    [
        ({"WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is not set.*start with"),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS is not set"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "is not set"),
        ({"PMI_SIZE": "8"}, "PMI_RANK is not set"),
        ({"FLUX_JOB_SIZE": "2"}, "FLUX_JOB_NNODES is not set"),
        ({**FLUX, "FLUX_JOB_SIZE": "7"}, "flux run --nodes=N --tasks-per-node=M"),
        ({**FLUX, "FLUX_JOB_NNODES": "0"}, "flux run"),
        (PALS_PMIX, "PMI_SIZE or WORLD_SIZE is not set.*mpiexec ... env NAME=N"),
        ({**KUBEFLOW, "PET_NPROC_PER_NODE": "8", "WORLD_SIZE": "16"}, r"start with launch/torchrun\.sh"),
        (TRAINER, r"PET_NNODES=2, PET_NPROC_PER_NODE=4 .* start with launch/torchrun\.sh"),
        ({"PET_NNODES": "1:4", "PET_RDZV_BACKEND": "c10d"}, "torchrun"),
        (AZUREML, "LOCAL_WORLD_SIZE is not set.*process_count_per_instance"),
        *(({name: "1"}, f"{name}=1 .*torchrun") for name in UNKNOWN),
        ({**OPENMPI, **PLACE, "MASTER_ADDR": "a b"}, "MASTER_ADDR is 'a b'"),
        ({**OPENMPI, **PLACE, "MASTER_ADDR": "[::1]"}, "MASTER_ADDR.*without brackets"),
        ({**OPENMPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4"}, "MASTER_PORT is ''"),
        # A list of this many nodes would not fit into memory.
        ({**ALLOCATION, **SRUN, "SLURM_STEP_TASKS_PER_NODE": ",".join(["9(x999999)"] * 1000)}, "do not fit"),
    ],
)
def test_never_alone_and_never_a_guess(environ, remedy):
    with pytest.raises(InputError, match=remedy):
        discover_ranks(environ)


@pytest.mark.parametrize("launcher", [MVAPICH2, MPICH, PALS_PMIX | {"WORLD_SIZE": "8"}, FLUX])
def test_a_launcher_without_an_address(launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match="set both variables") as error:
        discover_ranks(launcher)
    assert "\n" not in str(error.value)


EVERY = (SRUN, INTERACTIVE, OPENMPI, MVAPICH2, MPICH, PALS, PALS_PMIX, FLUX, KUBEFLOW, TRAINER, AZUREML, PLACE)
NAMES = sorted({name for environ in EVERY for name in environ} | set(UNKNOWN) | {
    "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "TORCHELASTIC_RUN_ID", "AZ_BATCH_MASTER_NODE", "PMI_LOCAL_RANK",
})  # fmt: skip
# What a variable may hold: no NUL, which no environment has; bytes that are not UTF-8 become lone surrogates.
VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "2", "5", "8", "-1", "4294967290", "9" * 30, "auto", "1:4", "4(x2)", "1(x99999)"]),
    st.integers(0, 10).map(str),
    st.text(st.sampled_from("09-+.,:;()[]x %=\n\u00b2\u0663\ud800\udcff\U0001f600"), max_size=8),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(EVERY), st.sampled_from(EVERY), st.sets(st.sampled_from(NAMES), max_size=6),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6),
)  # fmt: skip
def test_any_environment_gives_ranks_or_a_refusal(outer, inner, missing, changes):
    environ = without(outer | inner, *missing) | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mpi4py", None)
        try:
            ranks = discover_ranks(environ)
        except InputError:
            return
    assert 0 <= ranks.rank < ranks.world_size and 0 <= ranks.local_rank < ranks.local_world_size <= ranks.world_size
