"""One process of a job: the process group, lost ranks, requests to stop, SLURM, locks, atomic files."""
