"""One process among the ranks of a job: the process group, lost ranks, requests to stop, SLURM, locks, whole files."""
