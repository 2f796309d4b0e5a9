"""What has nothing to do with the paper: a user's mistakes, files, text, seeded draws, opening model folders.

It imports nothing of ours; everybody may import it.
"""
