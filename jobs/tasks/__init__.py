"""What is learnt: each task owns its loss, its exact counts over ranks and batches, its metrics and its figures."""
