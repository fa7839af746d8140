"""What leaves fmbench in forms that others read: trained models, and the results in records."""
