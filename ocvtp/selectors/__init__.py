"""What a learned pruner is trained with: scorers, relaxations, losses, schedules."""
