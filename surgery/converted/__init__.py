"""What comes out, written and read: derived classes, their registration, files, BOS policy, model card."""
