"""`batchwright bench`: how fast this machine runs four workloads, and other engines beside ours."""
