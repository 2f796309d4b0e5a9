"""What a run is: settings, its task, its folder, resume, cold start, metrics, memory plan, start and end of a process.

Imports everything below it, never evaluate.py or selfemo.py, which call it.
"""
