"""The order of samples, as a function of the config and the number of consumed samples."""
