"""What a run leaves behind: a record anyone can doubt and re-check, and the predictions to check it with."""
