"""What a run stands on: devices, the working directory, checkpoints, metrics and progress."""
