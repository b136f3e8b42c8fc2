"""Token files and their manifest. Files are read without conversion."""
