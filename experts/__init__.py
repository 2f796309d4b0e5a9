"""The expert M_e: how it is asked, personas and themes (Eq. 4, Table 4), gold weights, cold-start answers.

Stands beside `training`; called by selfemo.py, evaluate.py and `python -m experts`.
"""
