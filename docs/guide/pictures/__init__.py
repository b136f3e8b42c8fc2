"""The guide's pictures, and the runs that they are drawn from: `python -m docs.guide.pictures`."""
