"""What each layout costs."""
