"""The expert M_e: how it is asked, personas and themes (Eq. 4, Table 4), gold weights, cold-start answers.

Stands beside `training`, which calls it for the cold start, as evaluate.py and analysis/ do for their questions.
"""

import common  # noqa: F401  its check of Python comes first
