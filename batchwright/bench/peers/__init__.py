"""Runners of other engines. Each is run by the interpreter of that engine's environment.

They import nothing of this package: `peer_job.py` lies beside them and is found there.
"""
