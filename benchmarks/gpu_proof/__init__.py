"""What a GPU can prove in a few minutes: right results, speed beside others', training steps."""
