"""What changes time and memory and never a result: group cache, fast paths, micro-batches, processes, FSDP2, shards.

Imports `common` and model.py; knows no reward. Called by rollout.py, training/ and selfemo.py.
"""
