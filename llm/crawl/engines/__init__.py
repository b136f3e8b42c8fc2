"""What runs tasks: the cores of one machine, MPI, the executors of datatrove."""
