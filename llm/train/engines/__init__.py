"""The three engines: DeepSpeed, FSDP2, and the plain one that is their oracle."""
