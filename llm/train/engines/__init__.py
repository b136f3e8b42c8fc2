"""The three engines: DeepSpeed, FSDP2, and the plain one, which is the oracle of the others."""
