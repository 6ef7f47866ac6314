"""What is asked of trained networks: sliding windows, test-time flips, ensembles, intervals, new files."""
