"""What several tables use: problems with known answers, figures, compiled programs."""
