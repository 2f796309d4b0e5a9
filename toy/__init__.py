"""The invented world and its small base model: the whole paper on a laptop CPU, offline.

Stands beside `training`; called by training/launch.py, minimal.py and `python -m toy`.
"""

import common  # noqa: F401  its check of Python comes first
