"""What is computed from finished runs: audit, judge (Fig. 3), personas (App. B), tables.

Stands above `training` and `experts`; called by evaluate.py and the tools.
"""
