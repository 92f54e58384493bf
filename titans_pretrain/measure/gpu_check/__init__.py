"""`titans-pretrain gpu-check`: whether this machine's GPUs compute what the CPU does, how fast,
and in how much memory.

Nothing outside torch and Python is imported before a case needs it: where packages are missing the
rest still runs.
"""
