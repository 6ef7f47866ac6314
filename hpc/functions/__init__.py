"""What stands behind hpc.launch.Launcher: a user's functions as jobs, by submitit's pickle."""
