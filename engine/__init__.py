"""What changes time and memory, and never a result: caches, fast paths, micro-batches, processes, FSDP2, checkpoints.

Imports `common` and model.py; knows no reward. Called by rollout.py, training/ and selfemo.py.
"""
