"""What users give, checked: one validator for files, Python callers and HTTP."""
