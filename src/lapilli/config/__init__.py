"""What a checkpoint is: records, and the parser of foreign config files. No torch."""
