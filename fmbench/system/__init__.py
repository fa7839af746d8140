"""What lies between fmbench and the operating system."""
