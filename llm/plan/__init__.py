"""What a model and a step cost in closed form: parameters, arithmetic."""
