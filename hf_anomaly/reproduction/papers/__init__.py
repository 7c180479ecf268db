"""What each paper reports: its tables as cells, and its numbers."""
