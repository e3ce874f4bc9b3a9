"""Small trainings whose every number is recorded, so that code can move and change nothing."""
