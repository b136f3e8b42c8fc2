"""What a step costs in closed form: arithmetic, memory, bytes sent."""
