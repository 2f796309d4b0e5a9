"""MELD, EmoryNLP, IEMOCAP and JSON lines: dialogues and their turns, strict readers, download, counts against the paper.

Imports `common` alone and no torch; called by data.py.
"""
