"""What a run keeps and how it starts: sealed checkpoint folders, and the restore modes with their printed contract."""
