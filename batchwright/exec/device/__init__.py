"""The executor of a GPU: DeviceExecutor in executor.py, its parts one file each."""
