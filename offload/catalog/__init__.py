"""What is known: TimeMarks, views, backups."""
