"""What a user calls beside fit, validate, test and predict; each command's file registers its own options."""
