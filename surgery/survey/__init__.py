"""What a pass over text finds: one streaming pass, many observers, running statistics only."""
